"""Where the pieces of a schedule lie in each rank's symmetric memory, and which of them travel.

Tokens lead in every block (`[tokens, batch, heads, dim]`), and the pieces that a rank attends lie one after the other
in the order of their first use: what has arrived so far is one view, and attending it is one call without copies.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..mesh import cut
from ..transport.base import Pattern, Place, Transfer
from .schedule import Attend, Piece, Pull, Push, Schedule, Shape

ALIGN = 64  # elements; block runs start at multiples, so that vector loads are aligned for every dtype


@dataclass(frozen=True)
class Placement:
    """The memory plan of `schedule` for layers of `shape` on ranks that lie on `nodes`."""

    schedule: Schedule
    shape: Shape
    nodes: tuple[int, ...]

    @cached_property
    def tokens(self) -> tuple[range, ...]:
        return cut(self.shape.length, self.schedule.mesh.size)

    @cached_property
    def heads(self) -> tuple[range, ...]:
        return cut(self.shape.heads, self.schedule.slots)

    def dims(self, piece: Piece) -> tuple[int, int, int, int]:
        """The shape of a piece: [tokens, batch, heads, dim]."""
        return len(self.tokens[piece.tokens]), self.shape.batch, len(self.heads[piece.heads]), self.shape.dim

    def count(self, piece: Piece) -> int:
        """Elements of a piece."""
        tokens, batch, heads, dim = self.dims(piece)
        return tokens * batch * heads * dim

    def holder(self, piece: Piece, reader: int) -> int:
        """The rank in whose memory `reader` finds a piece of q, k, v or x."""
        return self.schedule.holder(piece, reader, self.nodes)

    def landing(self, piece: Piece, maker: int) -> Place:
        """Where `maker` writes a finished o piece: at home where it can address it, else in its own staging block."""
        at = piece.tokens if self.nodes[piece.tokens] == self.nodes[maker] else maker
        return self.place(piece, at)

    def runs(self, rank: int) -> list[list[Piece]]:
        """This rank's blocks, as runs of pieces that lie one after the other."""
        steps, slot = self.schedule.ranks[rank], self.schedule.slot(rank)
        pulled = [step.piece for step in steps if isinstance(step, Pull)]
        attends = [step for step in steps if isinstance(step, Attend)]
        used = [Piece("q", q, slot) for step in attends for q in step.q]
        used += [Piece(t, kv, slot) for t in "kv" for step in attends for kv in step.kv]
        together = {Piece("q", q, slot) for step in attends if len(step.q) > 1 for q in step.q}
        together |= {Piece(t, kv, slot) for t in "kv" for step in attends if len(step.kv) > 1 for kv in step.kv}
        stored = {
            piece for piece in pulled if piece in together or piece.tensor == "x" or self.holder(piece, rank) == rank
        }
        tensors = "qkv" if attends else "x"
        ordered = list(dict.fromkeys([*used, *(Piece("x", rank, 0) for _ in range(not attends)), *pulled]))
        runs = [[p for p in ordered if p.tensor == t and (p in stored or p.tokens == rank)] for t in tensors]
        if attends:
            others = [s for s in range(self.schedule.slots) if s != slot]
            runs += [[Piece(t, rank, s)] for t in "qkv" for s in others]
            runs += [[Piece("o", rank, s)] for s in range(self.schedule.slots)]
            pushed = [s.piece for s in steps if isinstance(s, Push) and self.nodes[s.home] != self.nodes[rank]]
            runs += [[piece] for piece in pushed]
        return runs

    @cached_property
    def blocks(self) -> tuple[dict[Piece, tuple[int, int]], ...]:
        """For every rank: (block number, offset in elements) of each piece in its memory."""
        found = []
        for rank in range(self.schedule.mesh.size):
            offset, blocks = 0, dict[Piece, tuple[int, int]]()
            for run in self.runs(rank):
                offset = -(-offset // ALIGN) * ALIGN
                for piece in run:
                    blocks[piece] = (len(blocks), offset)
                    offset += self.count(piece)
            found.append(blocks)
        return tuple(found)

    def place(self, piece: Piece, rank: int) -> Place:
        return Place(rank, self.blocks[rank][piece][0])

    def transfers(self) -> Iterable[Transfer]:
        """The pieces that cross nodes."""
        for source, target, piece in self.schedule.crossings(self.nodes):
            yield Transfer(self.place(piece, source), self.place(piece, target))

    def pattern(self, dtype: torch.dtype) -> Pattern:
        """What a transport needs to know of this placement."""
        return Pattern(
            dtype=dtype,
            spans=tuple(tuple((at, self.count(p)) for p, (_, at) in blocks.items()) for blocks in self.blocks),
            transfers=tuple(self.transfers()),
            names=tuple(tuple(str(piece) for piece in blocks) for blocks in self.blocks),
        )

    def view(self, memory: torch.Tensor, rank: int, pieces: Sequence[Piece]) -> torch.Tensor | None:
        """`pieces` of a tensor in `rank`'s memory as one `[tokens, batch, heads, dim]` view; None if they are apart."""
        start = end = self.blocks[rank].get(pieces[0], (0, -1))[1]
        for piece in pieces:
            if piece not in self.blocks[rank] or self.blocks[rank][piece][1] != end:
                return None
            end += self.count(piece)
        return memory[start:end].view(-1, *self.dims(pieces[0])[1:])

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
        return self.schedule.heads(self.shape.heads)

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
        steps, own = self.schedule.ranks[rank], self.schedule.own(rank)
        pulled = [step.piece for step in steps if isinstance(step, Pull)]
        attends = [step for step in steps if isinstance(step, Attend)]
        if not attends:
            return [list(dict.fromkeys([Piece("x", rank, 0), *pulled]))]
        used = {slot: _used([step for step in attends if step.heads == slot]) for slot in own}
        together = {p for slot in own for p in _used([s for s in attends if s.heads == slot], least=2)}
        stored = {p for p in pulled if p in together or self.holder(p, rank) == rank}
        stored |= {Piece(t, rank, slot) for t in "qkv" for slot in own}
        runs = [[p for p in used[slot] if p.tensor == t and p in stored] for slot in own for t in "qkv"]
        runs += [[Piece(t, rank, s)] for t in "qkv" for s in range(self.schedule.slots) if s not in own]
        runs += [[Piece("o", rank, s)] for s in range(self.schedule.slots) if s not in own]  # made by others
        pushed = [s.piece for s in steps if isinstance(s, Push) and self.nodes[s.home] != self.nodes[rank]]
        return runs + [[piece] for piece in pushed]

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

    def private(self, rank: int) -> set[Piece]:
        """What `rank` publishes and nobody else reads, where it is not attended together with other pieces."""
        used = [step for step in self.schedule.ranks[rank] if isinstance(step, Attend)]
        together = set(_used(used, least=2))
        others = [self.schedule.sources[other] for other in range(self.schedule.mesh.size) if other != rank]
        own = [Piece(tensor, rank, slot) for tensor in "qkv" for slot in self.schedule.own(rank)]
        return {piece for piece in own if piece not in together and not any(piece in pulled for pulled in others)}

    @cached_property
    def crossings(self) -> list[tuple[int, int, Piece]]:
        """(from, to, piece) of the pieces that cross nodes, in the order in which they should leave."""
        return self.schedule.crossings(self.nodes)

    def transfers(self) -> Iterable[Transfer]:
        """The pieces that cross nodes, in the same order."""
        for source, target, piece in self.crossings:
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
        rows = sum(len(self.tokens[piece.tokens]) for piece in pieces)
        return memory[start:end].view(rows, *self.dims(pieces[0])[1:])


def _used(attends: Sequence[Attend], least: int = 1) -> list[Piece]:
    """The pieces that `attends` use, in the order of their first use; of each operand of at least so many pieces."""
    used = [Piece("q", q, step.heads) for step in attends if len(step.q) >= least for q in step.q]
    used += [Piece(t, kv, s.heads) for t in "kv" for s in attends if len(s.kv) >= least for kv in s.kv]
    return list(dict.fromkeys(used))

"""Runs a schedule on a transport with a set of kernels: the one implementation of every method on every device."""

import torch

from ..kernels.base import Counted, Kernels, Partial, attend_counted
from ..mesh import Mesh
from ..spans import Spans
from ..transport.base import Place, Transport
from .methods import gather as gather_method
from .placement import Placement
from .replay import Replay
from .schedule import Attend, Piece, Pull, Push, Schedule, Shape


class Attention:
    """Sequence-parallel attention for one shape: publish q, k, v of this rank's tokens, then `attend`.

    tensors: the best order to publish them in.
    """

    def __init__(
        self,
        schedule: Schedule,
        shape: Shape,
        transport: Transport,
        kernels: Kernels,
        dtype: torch.dtype,
        spans: Spans,
    ) -> None:
        self.placement = Placement(schedule, shape, tuple(transport.spaces))
        self.kernels, self.spans = kernels, spans
        self.replay = Replay(self.placement, transport, kernels, dtype, spans)
        self.tensors, self.publish, self.project = self.replay.tensors, self.replay.publish, self.replay.project
        self.close, self.drain = self.replay.close, self.replay.drain

    def attend(self, keys: Counted | None = None) -> torch.Tensor:
        """The attention output of this rank's tokens, all heads: [B, tokens, H, D]; keys: see base.Sequence."""
        partial: dict[tuple[int, int], list[Partial]] = {}
        for step in self.replay.steps:
            match step:
                case Pull():
                    self.replay.pull(step)
                case Attend():
                    self._attend(step, partial, keys)
                case Push(piece, _):
                    self._push(piece, partial.pop((piece.tokens, piece.heads)))
            self.replay.at += 1
        out = self._collect({slot: found for (_, slot), found in partial.items()})
        self.replay.finish()
        return out

    def _operand(self, tensor: str, tokens: tuple[int, ...], slot: int) -> torch.Tensor:
        """The pieces of `tensor` as one tensor: a view where they lie together, in a peer's memory if only there."""
        replay = self.replay
        pieces = [Piece(tensor, who, slot) for who in tokens]
        if (view := replay.view(pieces, replay.rank)) is not None:
            return replay.here(view)
        parts = []
        for piece in pieces:
            here = piece in self.placement.blocks[replay.rank]
            part = replay.view([piece], replay.rank if here else self.placement.holder(piece, replay.rank))
            assert part is not None
            parts.append(part)
        return replay.here(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _attend(self, step: Attend, partial: dict[tuple[int, int], list[Partial]], keys: Counted | None) -> None:
        """Attends, and keeps the last result apart: the last merge of all writes where the whole is wanted."""
        start = self.spans.start("attend")
        q, k, v = (self._operand(t, step.q if t == "q" else step.kv, step.heads) for t in "qkv")
        if keys is None:
            out, lse = self.kernels.attend(q, k, v)
        else:
            out, lse = attend_counted(self.kernels, q, k, v, keys, [self.placement.tokens[who] for who in step.kv])
        at = 0
        for who in step.q:
            count, key = len(self.placement.tokens[who]), (who, step.heads)
            new = out[at : at + count], lse[at : at + count]
            found = partial.setdefault(key, [])
            if len(found) == 2:
                found[:] = [self.kernels.merge(*found[0], *found[1])]
            found.append(new)
            at += count
        self.spans.end("attend", "compute", start)

    def _push(self, piece: Piece, found: list[Partial]) -> None:
        start = self.spans.start("push o")
        place = self.placement.landing(piece, self.replay.rank)
        block = self.replay.view([piece], place.rank)
        assert block is not None
        self._write(found, block)
        self.replay.exchange.signal(place)
        nbytes = block.numel() * block.element_size()
        if place.rank == piece.tokens:  # written at home; what is staged is counted as it leaves
            self.replay.transport.traffic.intra += nbytes
        self.spans.end("push o", self.replay.lane(piece.tokens), start, nbytes)

    def _write(self, found: list[Partial], into: torch.Tensor) -> None:
        """Writes a finished result where it is wanted."""
        if len(found) == 1:
            into.copy_(found[0][0])
        elif into.device == self.replay.device:
            self.kernels.merge(*found[0], *found[1], into=into)
        else:
            into.copy_(self.kernels.merge(*found[0], *found[1])[0])

    def _collect(self, made: dict[int, list[Partial]]) -> torch.Tensor:
        """This rank's o: of the head slots in `made` its own results, of the others what comes home."""
        rank, placement = self.replay.rank, self.placement
        slots, shape = placement.schedule.slots, placement.shape
        if slots == 1 and len(made[0]) == 1:
            return made[0][0][0].transpose(0, 1)
        start = self.spans.start("wait o")
        size = shape.batch, len(placement.tokens[rank]), shape.heads, shape.dim
        out = torch.empty(size, dtype=self.replay.dtype, device=self.replay.device)
        for slot, heads in sorted(enumerate(placement.heads), key=lambda entry: entry[0] not in made):
            part = out[:, :, heads.start : heads.stop].transpose(0, 1)
            if slot in made:
                self._write(made[slot], part)
                continue
            piece = Piece("o", rank, slot)
            self.replay.exchange.wait(Place(rank, placement.blocks[rank][piece][0]))
            block = self.replay.view([piece], rank)
            assert block is not None
            part.copy_(block)
        self.spans.end("wait o", "inter" if len(set(self.replay.transport.nodes)) > 1 else "intra", start)
        return out


class Gather:
    """Brings all ranks' tokens together on every rank, by the same means as attention."""

    def __init__(
        self,
        batch: int,
        length: int,
        channels: int,
        transport: Transport,
        kernels: Kernels,
        dtype: torch.dtype,
        spans: Spans,
    ) -> None:
        schedule = Schedule.of("gather", gather_method, Mesh(("ring", transport.size)))
        placement = Placement(schedule, Shape(batch, length, 1, channels), tuple(transport.spaces))
        self.replay = Replay(placement, transport, kernels, dtype, spans)
        self.close, self.drain = self.replay.close, self.replay.drain

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: this rank's [B, tokens, C]; returns [B, L, C]."""
        replay = self.replay
        replay.publish("x", x[:, :, None])
        for step in replay.steps:
            assert isinstance(step, Pull)
            replay.pull(step)
            replay.at += 1
        pieces = [Piece("x", rank, 0) for rank in range(len(replay.placement.tokens))]
        parts = [replay.view([piece], replay.rank) for piece in pieces]
        out = torch.cat([part for part in parts if part is not None])[:, :, 0]
        out = replay.here(out).transpose(0, 1).contiguous()
        replay.finish()
        return out

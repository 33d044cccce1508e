"""Runs a schedule on a transport with a set of kernels: the one implementation of every method on every device."""

import torch

from ..kernels.base import Kernels, Norm, Tables, attend_counted
from ..mesh import Mesh
from ..spans import Spans
from ..transport.base import Exchange, Place, Transport
from .methods import gather as gather_method
from .placement import Placement
from .schedule import Attend, Piece, Pull, Push, Schedule, Shape, publishing

Partial = tuple[torch.Tensor, torch.Tensor]


class Replay:
    """One rank's part of a schedule, replayed round after round in symmetric memory."""

    def __init__(
        self, placement: Placement, transport: Transport, kernels: Kernels, dtype: torch.dtype, spans: Spans
    ) -> None:
        self.placement, self.transport, self.kernels, self.spans = placement, transport, kernels, spans
        self.rank = transport.rank
        self.steps = placement.schedule.ranks[self.rank]
        self.exchange: Exchange = transport.exchange(placement.pattern(dtype))
        self._set = 0
        self._open = False
        self.at = 0  # steps of this round that are done
        self._published = set[Piece]()
        self.device, self.dtype = torch.device("cpu"), dtype  # the device is that of what is published
        leaving = (p for source, _, p in placement.crossings if source == p.tokens == self.rank)
        own, slots = placement.schedule.own(self.rank), placement.schedule.slots
        self.tensors, self.slots = publishing(leaving, own, slots)

    def memory(self, rank: int) -> torch.Tensor:
        found = self.exchange.memory(rank, self._set)
        assert found is not None, f"rank {rank} cannot be addressed from rank {self.rank}"
        return found

    def view(self, pieces: list[Piece], rank: int) -> torch.Tensor | None:
        return self.placement.view(self.memory(rank), rank, pieces)

    def here(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device that computes: where GPUs talk through the host, symmetric memory is the host's."""
        return x.to(self.device)

    def publish(self, tensor: str, x: torch.Tensor, norm: Norm | None = None, tables: Tables | None = None) -> None:
        """Writes this rank's tokens of `tensor` into its blocks, one a head slot, and signals each.

        x: [B, tokens, H, D]; norm, tables: what it gets on its way, see kernels.cpu.embed.
        """
        blocks = self.blocks(tensor, x.device)
        if blocks[0][1].device == x.device:
            self.kernels.embed(x, norm, tables, blocks)
        else:
            made = [(heads, torch.empty_like(block, device=x.device)) for heads, block in blocks]
            self.kernels.embed(x, norm, tables, made)
            for (_, block), (_, new) in zip(blocks, made, strict=True):
                block.copy_(new)
        for slot in self.slots:
            self.signal(tensor, slot)

    def project(self, tensor: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """As `publish` of what a linear layer makes of x; without a copy where its product fits the blocks.

        x: [B, tokens, C]; weight: [H * D, C]; bias: [H * D].
        """
        shape, blocks = self.placement.shape, self.blocks(tensor, x.device)
        if not self._fits(x, [block for _, block in blocks]):
            made = torch.nn.functional.linear(x, weight, bias)
            self.publish(tensor, made.unflatten(2, (shape.heads, shape.dim)))
            return
        for slot, (heads, block) in zip(self.slots, blocks, strict=True):
            part = slice(heads.start * shape.dim, heads.stop * shape.dim)
            torch.addmm(bias[part], x[0], weight[part].t(), out=block.flatten(1))
            self.signal(tensor, slot)

    def _fits(self, x: torch.Tensor, blocks: list[torch.Tensor]) -> bool:
        """Whether a product of x is written into the blocks, one each, rather than whole and then copied."""
        if len(x) > 1 or any(block.device != x.device or block.dtype != x.dtype for block in blocks):
            return False
        return len(blocks) == 1 or min(block.numel() for block in blocks) >= self.kernels.LEAST_PART

    def blocks(self, tensor: str, device: torch.device) -> list[tuple[range, torch.Tensor]]:
        """The heads and the place of each of this rank's blocks of `tensor`, by `slots`; it is made on `device`."""
        if not self._open:
            self._set, self._open = self.exchange.begin(), True
        self.device = device
        blocks = []
        for slot in self.slots:
            block = self.view([Piece(tensor, self.rank, slot)], self.rank)
            assert block is not None
            blocks.append((self.placement.heads[slot], block))
        return blocks

    def signal(self, tensor: str, slot: int) -> None:
        """Says that this rank's block of `tensor` and of a head slot is written."""
        piece = Piece(tensor, self.rank, slot)
        self.exchange.signal(self.placement.place(piece, self.rank))
        self._published.add(piece)

    def pull(self, step: Pull) -> None:
        """Returns when the piece is readable; brings it to its place among this rank's pieces if it has one."""
        name = f"pull {step.piece.tensor}"
        start = self.spans.start(name)
        holder = self.placement.holder(step.piece, self.rank)
        self.exchange.wait(self.placement.place(step.piece, holder))
        nbytes = self.placement.count(step.piece) * self.memory(self.rank).element_size()
        if holder == self.rank:
            source = self.placement.holder(step.piece, step.source)
            self.spans.end(name, self.lane(source), start, nbytes)
            return
        if step.piece in self.placement.blocks[self.rank]:
            here, there = self.view([step.piece], self.rank), self.view([step.piece], holder)
            assert here is not None and there is not None
            here.copy_(there)
        self.transport.traffic.intra += nbytes
        self.spans.end(name, "intra", start, nbytes)

    def lane(self, peer: int) -> str:
        """The lane of what passes between this rank and `peer`."""
        nodes = self.transport.nodes
        return "intra" if nodes[peer] == nodes[self.rank] else "inter"

    def finish(self) -> None:
        """Ends the round: nothing of it is still leaving this rank's memory."""
        self.exchange.quiet()
        self._open, self.at = False, 0
        self._published.clear()

    def drain(self) -> None:
        """Goes through the rest of this round, or through the next, with whatever lies in memory.

        Nothing is computed or copied; but what others wait for they get, and what they send is waited for.
        """
        if not self._open:
            self._set, self._open = self.exchange.begin(), True
        own = [p for p in self.placement.blocks[self.rank] if p.tokens == self.rank]
        for piece in own:
            if piece.tensor != "o" and piece not in self._published:
                self.signal(piece.tensor, piece.heads)
        for step in self.steps[self.at :]:
            match step:
                case Pull(piece, _):
                    self.exchange.wait(self.placement.place(piece, self.placement.holder(piece, self.rank)))
                case Push(piece, _):
                    self.exchange.signal(self.placement.landing(piece, self.rank))
        for piece in own:
            if piece.tensor == "o":
                self.exchange.wait(self.placement.place(piece, self.rank))
        self.finish()

    def close(self) -> None:
        self.exchange.close()


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

    def attend(self, keys: torch.Tensor | None = None) -> torch.Tensor:
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

    def _attend(self, step: Attend, partial: dict[tuple[int, int], list[Partial]], keys: torch.Tensor | None) -> None:
        """Attends, and keeps the last result apart: the last merge of all writes where the whole is wanted."""
        start = self.spans.start("attend")
        q, k, v = (self._operand(t, step.q if t == "q" else step.kv, step.heads) for t in "qkv")
        if keys is None:
            out, lse = self.kernels.attend(q, k, v)
        else:
            tokens = [self.placement.tokens[who] for who in step.kv]
            counted = torch.cat([keys[:, part.start : part.stop] for part in tokens], dim=1)
            out, lse = attend_counted(self.kernels, q, k, v, counted)
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

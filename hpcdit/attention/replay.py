"""One rank's part of a schedule in symmetric memory: what it publishes, pulls and waits for, round after round."""

import torch

from ..kernels.base import Blocks, Kernels, Norm, Tables
from ..spans import Spans
from ..transport.base import Exchange, Transport
from .placement import Placement
from .schedule import Piece, Pull, Push, publishing


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
        self._private, self._held = placement.private(self.rank), dict[Piece, torch.Tensor]()
        self.device, self.dtype = torch.device("cpu"), dtype  # the device is that of what is published
        leaving = (p for source, _, p in placement.crossings if source == p.tokens == self.rank)
        own, slots = placement.schedule.own(self.rank), placement.schedule.slots
        self.tensors, self.slots = publishing(leaving, own, slots)

    def memory(self, rank: int) -> torch.Tensor:
        found = self.exchange.memory(rank, self._set)
        assert found is not None, f"rank {rank} cannot be addressed from rank {self.rank}"
        return found

    def view(self, pieces: list[Piece], rank: int) -> torch.Tensor | None:
        if rank == self.rank and pieces[0] in self._held:
            return self._held[pieces[0]]
        return self.placement.view(self.memory(rank), rank, pieces)

    def here(self, x: torch.Tensor) -> torch.Tensor:
        """x on the device that computes: where GPUs talk through the host, symmetric memory is the host's."""
        return x.to(self.device)

    def publish(self, tensor: str, x: torch.Tensor, norm: Norm | None = None, tables: Tables | None = None) -> None:
        """Writes this rank's tokens of `tensor` into its blocks, one a head slot, and signals each.

        x: [B, tokens, H, D], which stays as it is until the round ends: what nobody else reads, and nothing has to be
        done to, is not copied; norm, tables: what it gets on its way, see kernels.cpu.embed.
        """
        blocks: Blocks = self.blocks(tensor, x.device)
        if norm is None and tables is None and x.dtype == self.dtype:
            blocks = self._hold(tensor, x, blocks)
        if not blocks or blocks[0][1].device == x.device:
            self.kernels.embed(x, norm, tables, blocks)
        else:
            made = [(heads, torch.empty_like(block, device=x.device)) for heads, block in blocks]
            self.kernels.embed(x, norm, tables, made)
            for (_, block), (_, new) in zip(blocks, made, strict=True):
                block.copy_(new)
        for slot in self.slots:
            self.signal(tensor, slot)

    def _hold(self, tensor: str, x: torch.Tensor, blocks: Blocks) -> Blocks:
        """Keeps of x what only this rank reads; returns the other blocks."""
        left = []
        for slot, (heads, block) in zip(self.slots, blocks, strict=True):
            piece = Piece(tensor, self.rank, slot)
            if piece in self._private:
                self._held[piece] = x[:, :, heads.start : heads.stop].transpose(0, 1)
            else:
                left.append((heads, block))
        return left

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
        self._held.clear()

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

"""Sequence parallelism for one video shape, as a model sees it: its own tokens, publish, attend, gather."""

import torch

from ..kernels.base import Counted, Kernels
from ..mesh import cut
from ..spans import Spans
from ..transport.base import Transport
from .executor import Attention, Gather
from .schedule import Schedule, Shape


class SequenceParallel:
    """One group's attention over `shape`, over and over: the layers of a model, the steps of a video, the videos.

    Made and closed by all ranks of the transport together.
    """

    def __init__(
        self,
        schedule: Schedule,
        shape: Shape,
        transport: Transport,
        kernels: Kernels,
        dtype: torch.dtype,
        spans: Spans,
        channels: int,
    ) -> None:
        """channels: of the tokens that a pass ends with."""
        self.shape, self.spans, self.traffic = shape, spans, transport.traffic
        self.shares = cut(shape.length, transport.size)
        self.tokens = self.shares[transport.rank]
        self._attention = Attention(schedule, shape, transport, kernels, dtype, spans)
        self._gather = Gather(shape.batch, shape.length, channels, transport, kernels, dtype, spans)
        self._transport, self._kernels = transport, kernels
        self.tensors, self.publish = self._attention.tensors, self._attention.publish
        self.project = self._attention.project
        self.passes = 0  # that have ended
        self._rounds = 0  # of the pass at hand

    @property
    def shared(self) -> bool:
        """Whether other ranks have a part in it."""
        return self._transport.size > 1

    def spans_of_pass(self, layers: int) -> int:
        """How many spans all ranks together record of a pass of so many layers: their steps, and the wait for o."""
        ranks = self._attention.placement.schedule.ranks
        return sum(layers * (len(steps) + 1) + len(ranks) - 1 for steps in ranks)

    def attend(self, keys: Counted | None = None) -> torch.Tensor:
        """The attention of this rank's queries, [B, tokens, H, D], to all keys, or those that count: a round's end."""
        out = self._attention.attend(keys)
        self._rounds += 1
        return out

    def attend_whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The attention of q to keys that are all here, on any number of ranks: [B, tokens, H, D] each."""
        out, _ = self._kernels.attend(*(x.transpose(0, 1) for x in (q, k, v)))
        return out.transpose(0, 1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' tokens of x [B, tokens, C], on every rank: [B, L, C]."""
        whole = self._gather(x)
        self._end_pass()
        return whole

    def _end_pass(self) -> None:
        self._transport.join()
        self.passes, self._rounds = self.passes + 1, 0

    def drain(self, rounds: int) -> None:
        """Ends the pass at hand, or the next one, of so many rounds, without computing: others need not wait.

        For a rank that cannot go on where it was, so that all come to the end of the pass. What they get is junk.
        """
        for _ in range(rounds - self._rounds):
            self._attention.drain()
        self._gather.drain()
        self._end_pass()

    def close(self) -> None:
        self._attention.close()
        self._gather.close()

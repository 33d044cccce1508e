"""Sequence parallelism for one video shape, as a model sees it: its own tokens, publish, attend, gather."""

import torch

from ..kernels.base import Kernels
from ..mesh import cut
from ..transport.base import Transport
from .executor import Attention, Gather, Spans
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
    ) -> None:
        self.shape = shape
        self.tokens = cut(shape.length, transport.size)[transport.rank]
        self._attention = Attention(schedule, shape, transport, kernels, dtype, spans)
        self._gather: Gather | None = None
        self._transport, self._kernels, self._spans = transport, kernels, spans
        self.tensors, self.publish = self._attention.tensors, self._attention.publish
        self.project, self.attend = self._attention.project, self._attention.attend

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' tokens of x [B, tokens, C], on every rank: [B, L, C]."""
        if self._gather is None:
            batch, _, channels = x.shape
            self._gather = Gather(
                batch, self.shape.length, channels, self._transport, self._kernels, x.dtype, self._spans
            )
        whole = self._gather(x)
        self._transport.join()
        return whole

    def close(self) -> None:
        self._attention.close()
        if self._gather is not None:
            self._gather.close()

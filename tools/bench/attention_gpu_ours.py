"""hpcdit's own attention for attention_gpu.py: the one place that knows how it is set up on GPUs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpcdit.attention.executor import Attention, Spans
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.transport.base import Exchange, Transport

HEAP_BYTES = 40 << 30  # for all layouts at 64k tokens, each twice
LAYERS = Exchange.SETS  # of one call: buffer sets alternate by layer, so that a graph holds each of them once


def ours(attention: Attention, transport: Transport, own: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of `LAYERS` layers one after the other, as in a model.

    own: q, k, v, [B, tokens, H, D], of this rank. Runs on the current stream, eagerly or while that is captured.
    """
    outputs = []
    for _ in range(LAYERS):
        for name in attention.tensors:
            attention.publish(name, own[name])
        outputs.append(attention.attend())
    transport.join()
    return outputs


def start(cluster: Cluster, device: torch.device) -> Transport:
    """NVSHMEM among the ranks of the cluster. Raises ImportError where it is not installed."""
    from hpcdit.transport import nvshmem

    assert isinstance(cluster.world, World)
    nvshmem.start(cluster.world, device, HEAP_BYTES)
    return nvshmem.NvshmemTransport(cluster)


def attention(layout: Layout, shape: Shape, transport: Transport, dtype: torch.dtype) -> Attention:
    """Collective; to be closed."""
    from hpcdit.kernels import cuda  # type: ignore[attr-defined, unused-ignore]

    kernels: Any = cuda
    return Attention(layout.schedule(), shape, transport, kernels, dtype, Spans(None, lambda: 0.0))

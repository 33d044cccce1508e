"""hpcdit's own attention for attention_gpu.py: the one place that knows how it is set up on GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu import Attend
from torch import Tensor

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.kernels.base import Norm, Tables
from hpcdit.spans import Spans
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


@dataclass(frozen=True)
class Making:
    """What stands before attention in a model: the norm and the rotary embedding of q and k.

    norm: weight [H * D] and epsilon; tables: cos and sin, [tokens, 1, D / 2].
    """

    norm: Norm
    tables: Tables

    @classmethod
    def of(cls, q: Tensor) -> "Making":
        """For q, k of [B, tokens, H, D]."""
        _, tokens, heads, dim = q.shape
        angles = torch.rand(tokens, 1, dim // 2, device=q.device)
        return cls((torch.ones(heads * dim, dtype=q.dtype, device=q.device), 1e-6), (angles.cos(), angles.sin()))


def made_in_place(
    attention: Attention, transport: Transport, own: Mapping[str, Tensor], making: Making
) -> list[Tensor]:
    """As `ours`; q and k are made where other ranks read them, and v, which a projection wrote there, lies there."""
    outputs, replay = [], attention.replay
    for _ in range(LAYERS):
        for name in attention.tensors:
            if name == "v":
                replay.blocks(name, own[name].device)
                for slot in replay.slots:
                    replay.signal(name, slot)
            else:
                attention.publish(name, own[name], making.norm, making.tables)
        outputs.append(attention.attend())
    transport.join()
    return outputs


def pure_made(attend: Attend, own: Mapping[str, Tensor], v: Tensor, making: Making) -> list[Tensor]:
    """The work of `made_in_place` without any transfer: the same kernel makes q and k, one call attends them.

    own: of this rank, as there; v: of all tokens and of a rank's share of the heads. q and k have as many numbers, and
    are taken for such.
    """
    from hpcdit.kernels import cuda  # type: ignore[attr-defined, unused-ignore]

    made = []
    for name in "qk":
        block = torch.empty_like(own[name].transpose(0, 1), memory_format=torch.contiguous_format)
        cuda.embed(own[name], making.norm, making.tables, [(range(block.shape[2]), block)])
        made.append(block.view(v.shape))
    return [attend(*made, v)[0]]


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

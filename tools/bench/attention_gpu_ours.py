"""hpcdit's own attention for attention_gpu.py: the one place that knows how it is set up on GPUs."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu import Attend
from torch import Tensor

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.device import bind
from hpcdit.kernels.base import Norm, Tables
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.costs import Costs
from hpcdit.planner.price import timeline
from hpcdit.planner.search import plan_group
from hpcdit.planner.workload import Workload
from hpcdit.spans import Spans
from hpcdit.transport.base import Exchange, Place, Transport, probe

HEAP_BYTES = 40 << 30  # for all layouts at 64k tokens, each twice
MOST_LAYERS, TOKENS = 10, 160 << 10  # of one graph; the latter of all its layers, so that long ones do not take long
Outputs = deque[Tensor]  # of the last layers, one a buffer set


def layers_of(length: int) -> int:
    """Layers of one graph, an even number: a model's has 30 or more, and what it begins and ends with counts little."""
    return max(Exchange.SETS, min(MOST_LAYERS, TOKENS // length // 2 * 2))


def ours(attention: Attention, transport: Transport, own: Mapping[str, Tensor], layers: int) -> Outputs:
    """The outputs of layers one after the other, as in a model.

    own: q, k, v, [B, tokens, H, D], of this rank. Runs on the current stream, eagerly or while that is captured.
    """
    outputs = Outputs(maxlen=Exchange.SETS)
    for _ in range(layers):
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
    attention: Attention, transport: Transport, own: Mapping[str, Tensor], making: Making, layers: int
) -> Outputs:
    """As `ours`; q and k are made where other ranks read them, and v, which a projection wrote there, lies there."""
    outputs, replay = Outputs(maxlen=Exchange.SETS), attention.replay
    for _ in range(layers):
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


def beside(exchange: Exchange, transport: Transport, attend: Callable[[], object], layers: int) -> list[Tensor]:
    """Calls with as many bytes on their way as a layer moves, which nobody needs: more than that no method can hide."""
    for _ in range(layers):
        exchange.begin()
        exchange.signal(Place(transport.rank, 0))
        attend()
        exchange.quiet()
    transport.join()
    return []


def moving(transport: Transport, q: Tensor) -> Exchange:
    """For `beside`: what Ulysses moves of q, k, v and o that are each as large as q, this rank's part. To be closed."""
    nbytes = 4 * q.nbytes * (transport.size - 1) // transport.size
    return transport.exchange(probe(range(transport.size), nbytes))


def pick(nodes: Sequence[int], costs: Costs, shape: Shape, itemsize: int = 2) -> tuple[Layout, float]:
    """What parallel.method=auto would take for such layers, and the seconds of a layer that it counts on.

    nodes: of each rank; itemsize: bytes of a number.
    """
    width = shape.heads * shape.dim
    work = Workload(shape.length, shape.heads, shape.dim, 1, 4 * width, itemsize=itemsize)
    plan = plan_group(work, nodes, costs)
    return plan.layout, timeline(plan, work, costs, nodes)[1].seconds


def measured(cluster: Cluster, transport: Transport, dtype: torch.dtype, dim: int) -> Costs:
    """What the program itself measures at its start. Collective."""
    return calibrate(cluster, transport, bind("cuda", cluster.world), dtype, dim)


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

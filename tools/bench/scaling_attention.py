"""Layers of attention for scaling_groups.py: ours, as the planner takes it and by each layout, and yunchang's USP.

A layout is measured once on a number of ranks: between the GPUs of a host it is the same for whatever nodes the ranks
stand. What the planner takes depends on the nodes, by what links cost that it measures.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import attention_gpu_ours as own
import gpu
import torch
from scaling_rows import AUTO, RIVAL, Row
from torch import Tensor

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster
from hpcdit.mesh import cut
from hpcdit.planner.calibrate import calibrate
from hpcdit.planner.costs import Costs, Link
from hpcdit.spans import Spans
from hpcdit.transport.base import Exchange, Transport

if TYPE_CHECKING:
    from scaling_groups import Bench

DIM = 128


def powers(most: int) -> Iterator[int]:
    n = 1
    while n <= most:
        yield n
        n *= 2


def layouts(ranks: int, nodes: int) -> list[Layout]:
    """What there is on `ranks` ranks of `nodes` nodes; those that know no nodes come with one node."""
    near = ranks // nodes
    if nodes == 1:
        return [Layout("ulysses", ranks, 1), Layout("ring", 1, ranks)][:ranks]
    inside = [Layout("usp", near, nodes), Layout("tas", nodes, near)] if near > 1 else []
    return [*inside, Layout("torus", nodes, near)]


def shapes(bench: "Bench") -> Iterator[Shape]:
    yield from (Shape(1, length, heads, DIM) for length in bench.sizes.lengths for heads in bench.sizes.heads)


def case(shape: Shape) -> str:
    return f"L={shape.length} H={shape.heads}"


def tensors(bench: "Bench", ranks: int, shape: Shape) -> dict[str, Tensor]:
    """q, k and v of this rank's tokens."""
    tokens, to = len(cut(shape.length, ranks)[bench.world.rank % ranks]), bench.ours
    size = 1, tokens, shape.heads, shape.dim
    return {name: torch.randn(size, device=to.device.torch, dtype=to.dtype) for name in "qkv"}


@dataclass(frozen=True)
class Picker:
    """What links and kernels cost as all ranks find it, as one node and as many: kernels are the same for all groups,
    and so is a rank's share of a link."""

    near: Costs
    far: Costs
    itemsize: int

    @classmethod
    def measured(cls, bench: "Bench") -> "Picker":
        """Collective over the world."""
        ours, cluster = bench.ours, Cluster(bench.world, ranks_per_node=1)
        far = calibrate(cluster, ours.network.transport(cluster), ours.device, ours.dtype, DIM)
        cluster.close()
        return cls(ours.costs(DIM), far, ours.dtype.itemsize)

    def __call__(self, shape: Shape, ranks: int, nodes: int) -> tuple[Layout, float]:
        """What the planner takes, and the seconds that it counts on."""
        each, costs = ranks // nodes, self.near
        if nodes > 1:
            inter = Link(self.far.inter.latency_s, each * self.far.inter.bytes_per_s)
            costs = replace(self.far, inter=inter, intra=self.near.intra)
        return own.pick([rank // each for rank in range(ranks)], costs, shape, self.itemsize)


@dataclass(frozen=True)
class Layers:
    """Layers on groups of one size, whose ranks `transport` joins. picker: measures, the first time it is called."""

    bench: "Bench"
    picker: Callable[[], Picker]
    transport: Transport

    def row(self, shape: Shape, cell: Row, layout: Layout | None, qkv: dict[str, Tensor]) -> Row:
        """layout: None: the planner's."""
        predicted = None
        if layout is None:
            layout, predicted = self.picker()(shape, cell.ranks, cell.nodes)
        same = (cell.what, cell.case, cell.ranks, str(layout))
        known = (row.seconds for row in self.bench.done.values() if (row.what, row.case, row.ranks, row.plan) == same)
        seconds = next((found for found in known if found), None) or self._seconds(shape, layout, qkv)
        return replace(cell, plan=str(layout), seconds=seconds, predicted_s=predicted)

    def _seconds(self, shape: Shape, layout: Layout, qkv: dict[str, Tensor]) -> float:
        """Of a layer; on GPUs of some in a graph."""
        device, dtype, transport = self.bench.ours.device, self.bench.ours.dtype, self.transport
        spans, count = Spans(None, lambda: 0.0), own.layers_of(shape.length)
        made = Attention(layout.schedule(), shape, transport, device.kernels, dtype, spans)
        own.ours(made, transport, qkv, Exchange.SETS)  # every kernel runs before it is captured
        took = self.bench.seconds(device.repeated(partial(own.ours, made, transport, qkv, count), 1)) / count
        made.close()
        return took


def ours(bench: "Bench") -> None:
    """Each number of ranks, for all nodes that they can stand for."""
    picker = cache(partial(Picker.measured, bench))
    for n in bench.turns:
        group = bench.world.part(bench.world.size // n)
        cluster = Cluster(group)
        layers = Layers(bench, picker, bench.ours.network.transport(cluster))
        for shape in shapes(bench):
            for nodes in powers(n):
                fitting = [layout for layout in layouts(n, nodes) if layout.ulysses <= shape.heads]
                for layout in (None, *fitting):
                    cell = Row("attention", case(shape), n, nodes, AUTO if layout is None else str(layout))
                    bench.cell(cell, partial(tensors, bench, n, shape), partial(layers.row, shape, cell, layout))
        cluster.close()
        group.close()


def rivals(bench: "Bench") -> None:
    """yunchang's USP over NCCL with the quickest kernel, where there are GPUs and it is installed."""
    if not bench.ours.device.cuda or importlib.util.find_spec("yunchang") is None:
        gpu.say(bench.world, "no rivals: those are yunchang's, which is not installed, or has no GPUs here")
        return
    if bench.over():
        gpu.say(bench.world, "no time was left for yunchang's; the same command goes on with them")
        return
    gpu.nccl(bench.world, bench.ours.device.torch)
    name, attend = list(gpu.kernels().items())[-1]
    for n in (n for n in bench.turns if n > 1):
        usp = Usp(bench, n, attend)
        for shape in (shape for shape in shapes(bench) if shape.length % n == 0):
            for ulysses in (u for u in powers(n) if shape.heads % u == 0):
                cell = Row("attention", case(shape), n, 1, f"{RIVAL} {ulysses} x {n // ulysses}", name)
                bench.cell(cell, partial(tensors, bench, n, shape), partial(usp.row, cell, ulysses))


class Usp:
    """Its modules on groups of so many ranks, each made once: every call makes new groups for NCCL."""

    def __init__(self, bench: "Bench", ranks: int, attend: gpu.Attend) -> None:
        self.bench, self.ranks, self.attend, self._made = bench, ranks, attend, dict[int, Any]()

    def row(self, cell: Row, ulysses: int, qkv: dict[str, Tensor]) -> Row:
        module = self._module(ulysses)
        return replace(cell, seconds=self.bench.seconds(lambda: module(*(qkv[name] for name in "qkv"))))

    def _module(self, ulysses: int) -> Any:
        """Collective over the world: the groups of all ranks are made, of ranks that follow each other as ours do."""
        if ulysses not in self._made:
            from yunchang import (  # type: ignore[import-not-found, unused-ignore]
                LongContextAttention,
                set_seq_parallel_pg,
            )

            world = self.bench.world
            set_seq_parallel_pg(ulysses, self.ranks // ulysses, world.rank, world.size)
            # An attn_type that it does not know makes it call attn_processor.
            self._made[ulysses] = LongContextAttention(attn_type=None, attn_processor=self.attend)
        return self._made[ulysses]

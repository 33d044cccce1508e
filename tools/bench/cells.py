"""Runs chains of attention layers on all ranks, times them and checks what they computed."""

import json
import time
from dataclasses import dataclass

import numpy as np
import torch
from paced import PacedKernels, expected

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import MPI, Cluster
from hpcdit.kernels.base import Kernels
from hpcdit.mesh import cut
from hpcdit.planner.calibrate import links
from hpcdit.planner.costs import Link
from hpcdit.spans import Spans
from hpcdit.transport.mpi import MpiTransport

SETS = 3  # of q, k, v, by turns: two buffer sets alternate, and what one held before must not pass for what is wanted
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
WHAT = "a cell of the benchmark"
MESSAGES = 12  # of a measurement of links, at least


class WrongResult(Exception):
    """A layer that was timed has not computed what it should."""


class Bench:
    """Layers of one shape on all ranks of a cluster. All methods are called by all ranks together."""

    def __init__(self, cluster: Cluster, transport: MpiTransport, shape: Shape, dtype: torch.dtype) -> None:
        self.world, self.transport, self.shape, self.dtype = cluster.world, transport, shape, dtype
        self.nodes = tuple(cluster.nodes)
        self._mine = cut(shape.length, self.world.size)[self.world.rank]
        self._attentions: dict[Layout, Attention] = {}
        self._own = [self._mine_of(self.tensors(which)) for which in range(SETS)]
        self._expected: dict[tuple[bool, int], torch.Tensor] = {}

    def tensors(self, which: int) -> torch.Tensor:
        """q, k, v of set `which`, all tokens: [3, B, L, H, D], the same on every rank."""
        s, generator = self.shape, torch.Generator().manual_seed(which)
        return torch.randn(3, s.batch, s.length, s.heads, s.dim, generator=generator).to(self.dtype)

    def _mine_of(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of x: [..., B, tokens, H, D]."""
        return x[..., self._mine.start : self._mine.stop, :, :].clone()

    def reference(self, paced: bool, which: int) -> torch.Tensor:
        """The output of this rank's tokens for set `which`, by none of what is measured."""
        if (paced, which) not in self._expected:
            q, k, v = self.tensors(which)
            q = self._mine_of(q)
            if paced:
                out = expected(q, k, v)
            else:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            self._expected[paced, which] = out
        return self._expected[paced, which]

    def chain(self, layout: Layout, kernels: Kernels, layers: int) -> tuple[float, int]:
        """Seconds a layer of the slowest rank, and bytes a layer that crossed nodes, of all ranks together.

        Each rank begins a layer when its part of the one before is done, as in a model. Raises WrongResult.
        """
        if layout not in self._attentions:
            schedule, untimed = layout.schedule(), Spans(None, lambda: 0.0)
            made = Attention(schedule, self.shape, self.transport, kernels, self.dtype, untimed)
            self._attentions[layout] = made
            self.chain(layout, PacedKernels(), SETS)  # warm: connections are made, memory is touched
        attention = self._attentions[layout]
        attention.kernels = kernels
        self.transport.traffic.inter = 0
        self.world.barrier(WHAT)
        start = time.perf_counter()
        for layer in range(layers):
            own = dict(zip("qkv", self._own[layer % SETS], strict=True))
            for name in attention.tensors:
                attention.publish(name, own[name])
            out = attention.attend()
        seconds = self.world.largest(time.perf_counter() - start, WHAT)
        self._check(layout, out, isinstance(kernels, PacedKernels), (layers - 1) % SETS)
        return seconds / layers, round(self._sum(self.transport.traffic.inter) / layers)

    def _check(self, layout: Layout, out: torch.Tensor, paced: bool, which: int) -> None:
        good = torch.allclose(out, self.reference(paced, which), rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype])
        if self.world.largest(not good, WHAT):
            raise WrongResult(f"{layout}: the last layer's output is wrong")

    def alone(self, kernels: Kernels, repeats: int, tokens: int | None = None) -> float:
        """Seconds of one layer's attention in one call, with nothing else to do: the median of the slowest rank.

        tokens: of q, k and v, instead of all.
        """
        q, k, v = self.tensors(0)
        q, k, v = (x.transpose(0, 1)[:tokens] for x in (self._mine_of(q), k, v))
        times = []
        for _ in range(repeats + 1):
            self.world.barrier(WHAT)
            start = time.perf_counter()
            kernels.attend(q, k, v)
            times.append(self.world.largest(time.perf_counter() - start, WHAT))
        return float(np.median(times[1:]))

    def _sum(self, value: int) -> int:
        """Of all ranks, on all ranks."""
        mine, found = np.array([value], np.int64), np.empty(1, np.int64)
        self.world.complete(lambda: self.world.comm.Iallreduce(mine, found, MPI.SUM), range(self.world.size), WHAT)
        return int(found[0])

    def close(self) -> None:
        for attention in self._attentions.values():
            attention.close()
        self._attentions = {}


@dataclass(frozen=True)
class Machine:
    """What the links and a rank's own memory were found to do, the same on every rank."""

    inter: Link
    intra: Link
    copy_bytes_per_s: float
    call_s: float
    spread: float
    overlap: float = 1.0


def measure(transport: MpiTransport) -> Machine:
    """The links between nodes, copies and naps, of all ranks at once."""
    world = transport.cluster.world

    def copy(nbytes: int = 1 << 23) -> float:
        out, into = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        world.barrier(WHAT)
        start = time.perf_counter()
        into.copy_(out)
        return nbytes / (time.perf_counter() - start)

    def call(seconds: float = 2e-3, calls: int = 10) -> float:
        """What a paced call and its merge take beyond `seconds`."""
        q = torch.zeros(64, 1, 4, 64)
        kernels = PacedKernels(4 * q.numel() * len(q) / seconds)
        world.barrier(WHAT)
        start = time.perf_counter()
        for _ in range(calls):
            out = kernels.attend(q, q, q)
            kernels.merge(*out, *out)
        return (time.perf_counter() - start) / calls - seconds

    speeds, calls = ([measured() for _ in range(5)] for measured in (copy, call))
    found = [float(np.median(times)) for times in (speeds, calls)]
    everyone = [json.loads(text) for text in world.gather(json.dumps(found).encode(), 0, WHAT)] or [found]
    speed, overhead = np.mean(everyone, axis=0)
    speed, overhead = world.broadcast([float(speed), max(float(overhead), 0.0)], WHAT)
    inter, spread = links(transport)
    return Machine(inter, Link(5e-5, speed), speed, overhead, spread)


def describe(machine: Machine) -> str:
    """For the head of a report."""
    inter = machine.inter
    return json.dumps(
        {
            "inter_MB_per_s": round(inter.bytes_per_s / 1e6, 1),
            "inter_spread": round(machine.spread, 2),
            "inter_overlap": round(machine.overlap, 2),
            "inter_latency_us": round(inter.latency_s * 1e6),
            "copy_MB_per_s": round(machine.copy_bytes_per_s / 1e6),
            "call_us": round(machine.call_s * 1e6),
        }
    )

"""What test_transport.py runs under mpirun, on two GPUs: all cases in one start, a line for each.

`mpirun -n 2 python -m tests.gpu.transport_cases [NAME ...]`; the cases of DEAD end the program, and run by name alone.
"""

import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts

import torch

from hpcdit.attention.executor import Attention, Gather
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.errors import BrokenRun, InputError, PeerLost
from hpcdit.kernels import cpu
from hpcdit.mesh import cut
from hpcdit.spans import Spans
from hpcdit.transport.base import Pattern, Place, Transfer
from hpcdit.transport.nvshmem import NvshmemTransport, finish, start
from tests.attention_cases import unprojected

HEAP = 2 << 30
LIMIT_S = 90  # of a case; then it says where every thread stands
NAP_CYCLES = 20_000_000  # about 12 ms
UNTIMED = Spans(None, lambda: 0.0)
MODES = ("eager", "graph")
LAYOUTS = [
    Layout(method, *degrees)
    for method, pairs in {
        "ulysses": [(2, 1)],
        "ring": [(1, 2)],
        "usp": [(2, 1), (1, 2)],
        "tas": [(2, 1), (1, 2)],
        "torus": [(2, 1), (1, 2)],
    }.items()
    for degrees in pairs
]
CUTS = [(0, 1), (1, 2), (0, 3)]  # pieces, groups


class Wrong(Exception):
    """A result is not what it should be; all ranks raise it together, and the next case may run."""


class Bed:
    """What all cases use."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device
        self.clusters = {per_node: Cluster(world, per_node) for per_node in (1, 2)}
        self.transports = {n: NvshmemTransport(cluster) for n, cluster in self.clusters.items()}

    def check(self, error: float, limit: float, what: str) -> float:
        """The largest error of all ranks. Raises Wrong on all of them."""
        worst = self.world.largest(error if error == error else float("inf"), "the errors")
        if not worst <= limit:
            raise Wrong(f"{what}: an error of {worst:.3g}, allowed {limit:g}")
        return worst


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.cpu.attend, on any device, in plain torch."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=q.device)
    scores = torch.einsum("qbhd,kbhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.einsum("bhqk,kbhd->qbhd", (scores - lse).exp(), v.float())
    return out.to(q.dtype), lse[..., 0].permute(2, 0, 1)


PLAIN: Any = SimpleNamespace(attend=attend, merge=cpu.merge, embed=cpu.embed, LEAST_PART=0)


# Blocks


def blocks(bed: Bed, mode: str) -> str:
    """Blocks of many sizes and types there, back and on again, and empty ones, six rounds or more each."""
    sizes, dtypes = (1, 1000, 1 << 18, 1 << 23), (torch.uint8, torch.bfloat16, torch.float32, torch.float64)
    for dtype in dtypes:
        for count in sizes:
            wrong = exchanged(bed, bed.transports[1 + (count == 1000)], count, dtype, mode)
            bed.check(wrong, 0, f"{count} of {dtype}, wrong elements")
    return f"{len(sizes) * len(dtypes)} kinds of blocks"


def exchanged(bed: Bed, transport: NvshmemTransport, count: int, dtype: torch.dtype, mode: str) -> int:
    """Wrong elements, of what a: 0 -> 1 -> 0 and b: 1 -> 0 bring, and an empty block of each."""
    span = -(-count // 64) * 64
    spans = ((0, count), (span, count), (2 * span, count), (3 * span, 0), (3 * span, 0))
    names = ("own", "theirs", "own, back", "nothing", "their nothing")
    routes = [((0, 0), (1, 1)), ((1, 0), (0, 1)), ((1, 1), (0, 2)), ((0, 3), (1, 4)), ((1, 3), (0, 4))]
    transfers = tuple(Transfer(Place(*source), Place(*target)) for source, target in routes)
    pattern = Pattern(dtype, (spans,) * 2, transfers, (names,) * 2)
    rank = transport.rank
    base = (torch.arange(count, device=bed.device) % 97).to(dtype)
    shift = torch.zeros((), device=bed.device, dtype=dtype)
    wrong = torch.zeros((), device=bed.device, dtype=torch.int64)
    inbound = {1: 1 - rank, 4: 1 - rank} | ({2: 0} if rank == 0 else {})  # block: whose it is
    with closing(transport.exchange(pattern)) as exchange:

        def turn() -> None:
            memory = exchange.memory(rank, exchange.begin())
            assert memory is not None
            shift.add_(1).remainder_(13)
            memory[:count] = base + shift + 20 * rank
            for block in (3, 0):
                exchange.signal(Place(rank, block))
            for block, owner in inbound.items():
                exchange.wait(Place(rank, block))
                at, size = spans[block]
                wrong.add_((memory[at : at + size] != (base + shift + 20 * owner)[:size]).sum())
            exchange.quiet()

        def turns(number: int) -> None:
            for _ in range(number):
                turn()

        turns(6)
        for number in (3, 2, 1) if mode == "graph" else ():
            graph, _ = capture(transport, partial(turns, number))
            for _ in range(5):
                graph.replay()
            turn()
            graph.replay()
        transport.await_stream("the blocks")
    return int(wrong)


def capture(transport: NvshmemTransport, body: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`body` as a graph, and what it returned."""
    transport.await_stream("what is to be over before a capture")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        found = body()
        transport.join()
    return graph, found


# Attention


class Layers:
    """Layers of attention of one layout, each on inputs of its own, and what they should give."""

    def __init__(self, bed: Bed, layout: Layout, per_node: int, dtype: torch.dtype, kernels: Any, shape: Shape) -> None:
        self.bed, self.shape, self.dtype, self.late = bed, shape, dtype, False
        self.transport = bed.transports[per_node]
        self.attention = Attention(layout.schedule(), shape, self.transport, kernels, dtype, UNTIMED)
        width = shape.heads * shape.dim
        self.gather = Gather(shape.batch, shape.length, width, self.transport, kernels, dtype, UNTIMED)
        self.tokens = cut(shape.length, 2)[self.transport.rank]
        self.rounds = 0

    def close(self) -> None:
        self.attention.close()
        self.gather.close()

    def inputs(self, number: int) -> torch.Tensor:
        """q, k, v of all tokens: [3, B, L, H, D], the same on both ranks."""
        s, generator = self.shape, torch.Generator().manual_seed(number)
        return torch.randn(3, s.batch, s.length, s.heads, s.dim, generator=generator).to(self.bed.device, self.dtype)

    def own(self, number: int) -> torch.Tensor:
        return self.inputs(number)[:, :, self.tokens.start : self.tokens.stop].contiguous()

    def expected(self, number: int) -> torch.Tensor:
        """torch's own attention in float64: [B, L, H, D]."""
        q, k, v = (x.double().transpose(1, 2) for x in self.inputs(number))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def layer(self, own: torch.Tensor) -> torch.Tensor:
        self.rounds += 1
        sleeps = self.late and self.transport.rank == self.rounds % 2
        if sleeps:
            torch.cuda._sleep(NAP_CYCLES)
        for name in self.attention.tensors:
            if name == "v" and self.rounds % 2:
                self.attention.project(name, *unprojected(own[2]))
            else:
                self.attention.publish(name, own["qkv".index(name)])
        if self.late and not sleeps:
            torch.cuda._sleep(NAP_CYCLES // 3)
        return self.attention.attend()

    def error(self, number: int, out: torch.Tensor, whole: bool = False) -> float:
        """Of a layer's output, or of the gathered one, beside the largest number that is expected."""
        expected = self.expected(number)
        mine = expected.flatten(2) if whole else expected[:, self.tokens.start : self.tokens.stop]
        error = float((out.double() - mine).abs().max() / expected.abs().max()) if out.numel() else 0.0
        return error if error == error else float("inf")

    def eager(self, count: int) -> float:
        """The largest error of so many layers."""
        outs = [self.layer(own) for own in [self.own(number) for number in range(count)]]
        whole = self.gather(outs[-1].flatten(2))
        self.transport.join()
        self.transport.await_stream("the layers")
        return max(self.error(count - 1, whole, whole=True), *(self.error(n, out) for n, out in enumerate(outs)))

    def graph(self, count: int, replays: int) -> float:
        """As eager, of a graph of `count` layers that is replayed, now and then with other layers in between."""
        worst = self.eager(2)
        held = [torch.empty_like(self.own(0)) for _ in range(count)]

        def layers() -> tuple[list[torch.Tensor], torch.Tensor]:
            outs = [self.layer(own) for own in held]
            return outs, self.gather(outs[-1].flatten(2))

        graph, (outs, whole) = capture(self.transport, layers)
        owns = [[self.own(10 + replay * count + i) for i in range(count)] for replay in range(replays)]
        between, kept, others = self.own(5), [], []
        for replay, own in enumerate(owns):
            for target, source in zip(held, own, strict=True):
                target.copy_(source)
            graph.replay()
            kept.append([x.clone() for x in (*outs, whole)])
            if replay % 3 == 1:
                others.append(self.layer(between))
        self.transport.await_stream("the replays")
        worst = max([worst, *(self.error(5, out) for out in others)])
        for replay, (*found, last) in enumerate(kept):
            first = 10 + replay * count
            worst = max(worst, self.error(first + count - 1, last, whole=True))
            worst = max([worst, *(self.error(first + i, out) for i, out in enumerate(found))])
        return worst


def attention(bed: Bed, layout: Layout, mode: str) -> str:
    """A method in float32 and bfloat16, as two nodes and as one, cut in several ways, of uneven lengths and heads."""
    worst, count = {torch.float32: 0.0, torch.bfloat16: 0.0}, 0
    limits = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
    for per_node in (1, 2):
        for dtype in worst:
            for pieces, groups in CUTS:
                cut_up = Layout(layout.method, layout.ulysses, layout.ring, pieces, groups)
                shape = Shape(1 + count % 2, 61 + 40 * (count % 3), 5, 16)
                with closing(Layers(bed, cut_up, per_node, dtype, PLAIN, shape)) as layers:
                    error = layers.graph(1 + count % 3, 10) if mode == "graph" else layers.eager(5)
                    worst[dtype] = max(worst[dtype], bed.check(error, limits[dtype], f"{cut_up}, {per_node} a node"))
                count += 1
    return f"{count} problems, errors {', '.join(f'{error:.1e}' for error in worst.values())}"


def late(bed: Bed, mode: str) -> str:
    """Each rank in turn publishes late, the other attends late."""
    worst = 0.0
    for layout in (Layout("ulysses", 2, 1), Layout("ring", 1, 2, groups=2), Layout("torus", 2, 1, groups=3)):
        with closing(Layers(bed, layout, 1, torch.float32, PLAIN, Shape(1, 131, 6, 16))) as layers:
            layers.late = True
            error = layers.graph(3, 4) if mode == "graph" else layers.eager(9)
            worst = max(worst, bed.check(error, 2e-5, str(layout)))
    return f"errors {worst:.1e}"


def synchronised(bed: Bed) -> str:
    """A rank whose host waits for its device in the middle of a round is no deadlock, outside of graphs."""
    with closing(Layers(bed, Layout("ring", 1, 2), 1, torch.float32, PLAIN, Shape(1, 64, 4, 16))) as layers:
        for number in range(4):
            own = layers.own(number)
            for name in layers.attention.tensors:
                layers.attention.publish(name, own["qkv".index(name)])
                torch.cuda.synchronize()
            error = layers.error(number, layers.attention.attend())
            bed.check(error, 2e-5, "a layer")
    return "4 layers"


def kernels(bed: Bed) -> str:
    """hpcdit's own kernels for GPUs, in bfloat16, as they come and in a graph."""
    try:
        own: Any = importlib.import_module("hpcdit.kernels.cuda")
    except ImportError as error:
        return f"left out, {error}"
    worst = 0.0
    for layout in (*LAYOUTS, Layout("torus", 2, 1, groups=3), Layout("ring", 1, 2, groups=2)):
        with closing(Layers(bed, layout, 1, torch.bfloat16, own, Shape(2, 1021, 6, 128))) as layers:
            worst = max(worst, bed.check(layers.eager(5), 2e-2, str(layout)))
            worst = max(worst, bed.check(layers.graph(3, 4), 2e-2, f"{layout}, in a graph"))
    return f"errors {worst:.1e}"


# The rest


def memory(bed: Bed) -> str:
    """What does not fit is refused on every rank, and what is closed is free again."""
    transport = bed.transports[1]
    heap = transport.heap

    def pattern(nbytes: int) -> Pattern:
        return Pattern(torch.uint8, (((0, nbytes),),) * 2, (), (("a block",),) * 2)

    refused = 0
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(closing(transport.exchange(pattern(heap.nbytes // 6))))
        try:
            stack.enter_context(closing(transport.exchange(pattern(heap.nbytes // 4))))
        except BrokenRun as error:
            refused, said = 1, str(error)
    bed.check(1 - refused, 0, "refused")
    with closing(transport.exchange(pattern(heap.nbytes // 2 - (1 << 20)))):
        pass
    bed.check(heap.nbytes - heap.free(), 0, "bytes still taken")
    return said


def links(bed: Bed) -> str:
    """Whether seconds are such as can be; says them."""
    found = []
    for per_node, others in ((1, 1), (2, 0)):
        seconds = {n: bed.transports[per_node].measure(n, others) for n in (64, 1 << 20, 1 << 24, 1 << 28)}
        for nbytes, taken in seconds.items():
            bed.check(nbytes / taken, 2e12, "bytes a second")
            bed.check(taken, 1.0, "seconds")
        found.append(" ".join(f"{taken * 1e6:.0f}" for taken in seconds.values()))
    return f"us of 64 B, 1, 16, 256 MiB: {'; to a mate: '.join(found)}; {bed.transports[1].describe()}"


def without_front_end(bed: Bed) -> str:
    """Signals as copies and waits as kernels, which is how it goes where stream memory operations do not work."""
    heap = bed.transports[1].heap
    found, heap.front_end = heap.front_end, None
    try:
        return "; ".join(f"{mode}: {blocks(bed, mode)}, {late(bed, mode)}" for mode in MODES)
    finally:
        heap.front_end = found


def counted(bed: Bed) -> str:
    """Bytes are counted by link class, as nodes lie: two nodes, then one."""
    found = []
    for per_node, transport in bed.transports.items():
        traffic = transport.traffic
        traffic.inter = traffic.intra = 0
        with closing(
            Layers(bed, Layout("ulysses", 2, 1), per_node, torch.float32, PLAIN, Shape(1, 64, 4, 8))
        ) as layers:
            layers.layer(layers.own(0))
            expected = 4 * (32 * 2 * 8) * 4  # q, k, v and o of half the tokens and heads, of 4 bytes
            far, near = (expected, 0) if per_node == 1 else (0, expected)
            bed.check(abs(traffic.inter - far) + abs(traffic.intra - near), 0, f"{traffic}, {per_node} a node; bytes")
        found.append(f"inter {traffic.inter} intra {traffic.intra}")
    return "; ".join(found)


CASES: dict[str, Callable[[Bed], str]] = {
    **{f"blocks, {mode}": partial(blocks, mode=mode) for mode in MODES},
    **{f"{layout}, {mode}": partial(attention, layout=layout, mode=mode) for mode in MODES for layout in LAYOUTS},
    **{f"a late rank, {mode}": partial(late, mode=mode) for mode in MODES},
    "a host that synchronises": synchronised,
    "without the front end": without_front_end,
    "memory": memory,
    "bytes": counted,
    "links": links,
    "hpcdit's kernels": kernels,
}
DEAD = {f"a dead rank, {mode}": mode for mode in MODES}


def dead(bed: Bed, mode: str) -> str:
    """Rank 1 is gone after three layers; what rank 0 then says, and after how many seconds."""
    bed.world.timeout_s = 3
    layers = Layers(bed, Layout("ulysses", 2, 1), 1, torch.float32, PLAIN, Shape(1, 61, 5, 16))
    layers.eager(3)
    own = layers.own(0)
    graph = capture(layers.transport, lambda: layers.layer(own))[0] if mode == "graph" else None
    bed.world.barrier("the death")
    if bed.world.rank == 1:
        os._exit(1)
    begun = time.monotonic()
    try:
        if graph is None:
            layers.layer(own)
        else:
            graph.replay()
        layers.transport.await_stream("the end of a step")
    except PeerLost as error:
        return f"after {time.monotonic() - begun:.1f} s: {error}"
    raise AssertionError("nobody is missed")


def bind(world: World) -> torch.device:
    """The device of this rank's own, or the one that its launcher shows it."""
    own = world.host_comm.rank if torch.cuda.device_count() >= world.host_comm.size else 0
    device = torch.device("cuda", own)
    torch.cuda.set_device(device)
    return device


def main(names: Sequence[str]) -> int:
    world = World()
    world.timeout_s = 30

    def say(text: str) -> None:
        if world.rank == 0:
            print(text, flush=True)

    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    try:
        device = bind(world)
        start(world, device, HEAP)
    except InputError as error:
        say(f"FAIL start: {error}")
        return 2
    bed, failed = Bed(world, device), 0
    say(f"on {torch.cuda.get_device_name(device)}: {bed.transports[1].describe()}")
    for name in names or CASES:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        say(f"run {name}")
        begun = time.monotonic()
        if name in DEAD:
            say(f"ok {name}: {dead(bed, DEAD[name])}")
            os._exit(0)
        try:
            line = f"ok {name}: {CASES[name](bed)}"
        except Wrong as error:
            failed, line = failed + 1, f"FAIL {name}: {error}"
        say(f"{line} ({time.monotonic() - begun:.1f} s)")
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    finish()
    for cluster in bed.clusters.values():
        cluster.close()
    world.close()
    faulthandler.cancel_dump_traceback_later()
    say(f"ended, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException:  # one rank's end is the end of all
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(code)

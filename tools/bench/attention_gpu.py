"""One attention layer on several GPUs: ours over NVSHMEM, yunchang's Ulysses and Ring over NCCL, and the pure compute.

mpirun -n 2 python tools/bench/attention_gpu.py --lengths 4k,8k,16k,32k,64k --layouts "ulysses 2x1; torus 2x1"

The pure time is that of one call of plain attention with the same work for each GPU: all tokens, its part of the heads,
as a CUDA graph, with the faster kernel. It has q, k and v where it reads them; a method copies them to where others
read them first. In a model neither is so: a kernel that norms and rotates q and k writes them somewhere in any case,
and the projection writes v. So there is a second comparison, "made in place": pure, that kernel into plain tensors and
one call; a method, the same kernel into what others read, where v lies already, and its layer.

yunchang 0.6.4 (the library behind xDiT) is given its kernels by hand: by
itself it finds FlashAttention 3 only under another name, and its own call of cuDNN returns no lse, so that its ring
would merge wrongly.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

import attention_gpu_ours as own
import gpu
import torch
import torch.distributed as dist
from attention import parse
from torch import Tensor

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.errors import InputError
from hpcdit.mesh import cut
from hpcdit.transport.base import Exchange, Transport

DTYPE = torch.bfloat16
TIMED, CHECKED = 0, 1  # seeds of what is timed, and of what is computed once, at the end, and compared
ROWS = 64  # of each rank's tokens, compared with float64
Closing = list[Attention | Exchange]


@dataclass
class Way:
    """A way to compute the layer. call: `layers` layers, whose outputs it returns; whole: they are the layer's own.

    made: the same with q and k made in place.
    """

    name: str
    call: Callable[[], Sequence[Tensor]]
    layers: int = 1
    whole: bool = True
    made: "Way | None" = None
    times: list[float] = field(default_factory=list)

    def typical(self, world: World) -> float:
        """The median time of a layer, of the slowest GPU. Called by all ranks together."""
        return world.largest(statistics.median(self.times), gpu.WHAT)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4k,8k,16k,32k,64k", help="tokens, a list; k: 1024")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layouts", help='"usp 1x2; torus 2x1 g2": ulysses x ring, groups, pieces; default: five')
    parser.add_argument("--ranks-per-node", type=int, default=1, help="GPUs that stand for a node; 0: real nodes")
    parser.add_argument("--repeat", type=int, default=5, help="turns of each method")
    parser.add_argument("--without", default="", help="methods to leave out, by parts of their names: 'ring,cuDNN'")
    return parser


def lengths(text: str, ranks: int) -> list[int]:
    """Raises InputError."""
    try:
        found = [int(w[:-1]) * 1024 if w.endswith("k") else int(w) for w in text.replace(" ", "").split(",")]
    except ValueError:
        raise InputError(f"--lengths: {text!r} is not like 4k,8192") from None
    if any(length <= 0 or length % ranks for length in found):
        raise InputError(f"--lengths: yunchang wants multiples of the {ranks} ranks")
    return found


def layouts(text: str | None, ranks: int, heads: int) -> list[Layout]:
    """Raises InputError."""
    default = f"ulysses {ranks}x1; ring 1x{ranks}; usp 1x{ranks} g2; torus {ranks}x1; torus {ranks}x1 g2"
    found = [layout for layout in parse(text or default, ranks, heads) if isinstance(layout, Layout)]
    if len(found) < len(parse(text or default, ranks, heads)):
        raise InputError("--layouts: auto is not to be had here")
    return found


class Layer:
    """The tensors of one layer of attention, and what this rank has of them."""

    def __init__(self, shape: Shape, world: World, device: torch.device) -> None:
        self.shape, self.world, self.device = shape, world, device
        self.tokens = cut(shape.length, world.size)[world.rank]
        q, k, v = (self._mine(x).clone() for x in self.all(TIMED))
        self.own = {"q": q, "k": k, "v": v}

    def all(self, seed: int) -> Tensor:
        """q, k, v of all tokens, [3, B, L, H, D]: the same on every rank."""
        s, generator = self.shape, torch.Generator(self.device).manual_seed(seed)
        shape = (3, s.batch, s.length, s.heads, s.dim)
        return torch.randn(shape, generator=generator, device=self.device, dtype=DTYPE)

    def fill(self, seed: int) -> None:
        """Other values, in the same memory: graphs read them there."""
        for x, new in zip((self.own[name] for name in "qkv"), self.all(seed), strict=True):
            x.copy_(self._mine(new))
        torch.cuda.synchronize()

    def _mine(self, x: Tensor) -> Tensor:
        return x[:, self.tokens.start : self.tokens.stop]

    def part(self) -> list[Tensor]:
        """q, k, v of all tokens and of so many heads as give each GPU the same work."""
        heads = self.shape.heads // self.world.size
        return [x[:, :, :heads].contiguous() for x in self.all(TIMED)]

    def reference(self, seed: int) -> tuple[Tensor, Tensor]:
        """Some rows of this rank's tokens, and the output there in float64: [B, rows, H, D]."""
        q, k, v = self.all(seed)
        rows = torch.linspace(0, len(self.tokens) - 1, min(ROWS, len(self.tokens)), device=self.device).long()
        some, parts = self._mine(q)[:, rows].double(), []
        for head in range(self.shape.heads):
            scores = some[:, :, head] @ k[:, :, head].double().transpose(1, 2) / sqrt(self.shape.dim)
            parts.append(scores.softmax(-1) @ v[:, :, head].double())
        return rows, torch.stack(parts, 2)


def pure(
    layer: Layer, kernels: dict[str, gpu.Attend], making: own.Making | None, transport: Transport | None, made: Closing
) -> list[Way]:
    """One call; with `transport` also beside transfers, whose exchange is added to `made`, which is to be closed."""
    q, k, v = layer.part()
    ways = []

    def once(attend: gpu.Attend) -> list[Tensor]:
        return [attend(q, k, v)[0]]

    for name, attend in kernels.items():
        way = Way(f"pure, {name}", gpu.captured(partial(once, attend)), whole=False)
        if making is not None:
            way.made = Way(way.name, gpu.captured(partial(own.pure_made, attend, layer.own, v, making)))
        ways.append(way)
    if transport is not None:
        name, attend = list(kernels.items())[-1]
        made.append(own.moving(transport, layer.own["q"]))
        count = own.layers_of(layer.shape.length)
        call = partial(own.beside, made[-1], transport, partial(once, attend), count)
        ways.append(Way(f"pure, {name}, beside as many bytes", gpu.captured(call), count, whole=False))
    return ways


def yunchang(world: World, kernels: dict[str, gpu.Attend]) -> dict[str, Any]:
    """Its Ulysses and its Ring as modules, with each of the kernels. Raises ImportError where it is not installed."""
    from yunchang import (  # type: ignore[import-not-found, unused-ignore]
        LongContextAttention,
        UlyssesAttention,
        set_seq_parallel_pg,
    )
    from yunchang.kernels import AttnType  # type: ignore[import-not-found, unused-ignore]

    set_seq_parallel_pg(1, world.size, world.rank, world.size)  # ulysses, ring: for LongContextAttention
    found = {}
    for name, attend in kernels.items():
        ulysses = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_FLASH)
        ulysses.attn_fn = attend
        found[f"yunchang Ulysses, {name}"] = ulysses
        # An attn_type that it does not know makes it call attn_processor.
        found[f"yunchang Ring, {name}"] = LongContextAttention(attn_type=None, attn_processor=attend)
    return found


def rivals(layer: Layer, modules: dict[str, Any]) -> list[Way]:
    def once(module: Any) -> list[Tensor]:
        return [module(*(layer.own[name] for name in "qkv"))]

    return [Way(name, partial(once, module)) for name, module in modules.items()]


def hpcdit(
    layer: Layer, transport: Transport, making: own.Making, wanted: Sequence[Layout], made: Closing
) -> list[Way]:
    """Each layout as a graph; what is to be closed is added to `made`."""
    ways, count = [], own.layers_of(layer.shape.length)
    for layout in wanted:
        attention = own.attention(layout, layer.shape, transport, DTYPE)
        made.append(attention)
        # v is in place from the calls before this capture
        way = Way(str(layout), gpu.captured(partial(own.ours, attention, transport, layer.own, count)), count)
        in_place = partial(own.made_in_place, attention, transport, layer.own, making, count)
        way.made = Way(way.name, gpu.captured(in_place), count)
        ways.append(way)
    return ways


def measure(ways: Sequence[Way], world: World, repeat: int, layers: int) -> None:
    """Methods take turns, so that a GPU that grows warm is no one method's bad luck.

    layers: that are timed in each turn, after as many that are not.
    """
    every = [each for way in ways for each in (way, way.made) if each is not None]
    for turn in range(repeat + 1):
        for way in every:
            world.barrier(gpu.WHAT)
            # As many layers for each: what a GPU's power lets it do changes within milliseconds.
            half = layers // way.layers
            found = gpu.seconds(way.call, 2 * half)
            if turn:  # the first is for warming
                way.times += [time / way.layers for time in found[half:]]


def report(layer: Layer, ways: Sequence[Way], picked: str) -> str:
    """The table of one length, and the check of what was timed. Called by all ranks together.

    picked: what parallel.method=auto would take, for the title.
    """
    world = layer.world
    medians = [way.typical(world) for way in ways]
    in_place = [way.made.typical(world) if way.made else None for way in ways]
    best = min(time for time, way in zip(medians, ways, strict=True) if not way.whole)
    best_made = min((t for t, way in zip(in_place, ways, strict=True) if t and not way.whole), default=0.0)
    layer.fill(CHECKED)
    rows, reference = layer.reference(CHECKED)
    lines = []
    for way, typical, made in zip(ways, medians, in_place, strict=True):
        error = "-"
        if way.whole:
            world.barrier(gpu.WHAT)
            mine = max(gpu.difference(out[:, rows], reference) for out in way.call())
            error = f"{world.largest(mine, gpu.WHAT):.1e}"
        least, most = (world.largest(find(way.times), gpu.WHAT) for find in (min, max))
        figures = (f"{seconds * 1e3:.3f}" for seconds in (typical, least, most))
        second = [f"{made * 1e3:.3f}", f"{best_made / made:.2f}"] if made else ["-", "-"]
        lines.append([way.name, *figures, f"{best / typical:.2f}", *second, error])
    head = ["method", "median ms", "min", "max", "pure / median", "made in place, ms", "pure / it", "error"]
    s = layer.shape
    return f"\nL = {s.length}, H = {s.heads}, D = {s.dim}, {DTYPE}{picked}\n{gpu.table(head, lines)}"


@torch.no_grad()
def body(args: argparse.Namespace, world: World) -> None:
    device = gpu.bind(world)
    wanted, sizes = layouts(args.layouts, world.size, args.heads), lengths(args.lengths, world.size)
    if args.heads % world.size:
        raise InputError(f"--heads: yunchang's Ulysses wants a multiple of the {world.size} ranks")
    cluster = Cluster(world, args.ranks_per_node or None)
    gpu.nccl(world, device)
    kernels = gpu.kernels()
    gpu.say(world, f"{gpu.cards(world, device)}; as {cluster.node_count} nodes; kernels: {', '.join(kernels)}")
    gpu.say(world, "ms a layer, medians of the slowest GPU; error: relative to float64; made in place: see --help")
    transport: Transport | None = None
    costs = None
    try:
        transport = own.start(cluster, device)
        costs = own.measured(cluster, transport, DTYPE, args.dim)
    except ImportError as error:
        gpu.say(world, f"without hpcdit: {error}")
    modules: dict[str, Any] = {}
    try:
        modules = yunchang(world, kernels)
    except ImportError as error:
        gpu.say(world, f"without yunchang: {error}")
    left_out = [word.strip() for word in args.without.split(",") if word.strip()]
    for length in sizes:
        layer, made = Layer(Shape(1, length, args.heads, args.dim), world, device), Closing()
        making = own.Making.of(layer.own["q"]) if transport is not None else None
        ways = [*pure(layer, kernels, making, transport, made), *rivals(layer, modules)]
        picked = ""
        if transport is not None and making is not None and costs is not None:
            auto, seconds = own.pick(cluster.nodes, costs, layer.shape)
            picked = f"; auto: {auto}, {seconds * 1e3:.3f} ms by the model"
            ways += hpcdit(layer, transport, making, list(dict.fromkeys([*wanted, auto])), made)
        ways = [way for way in ways if not way.whole or not any(word in way.name for word in left_out)]
        measure(ways, world, args.repeat, own.layers_of(length))
        gpu.say(world, report(layer, ways, picked))
        torch.cuda.synchronize()
        del layer, ways  # graphs go before the memory that they use
        gc.collect()
        for each in made:
            each.close()
        torch.cuda.empty_cache()
    cluster.close()


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

"""Attention and steps of a model on groups of 1, 2, 4 ... of the ranks, for scaling.py, which see.

All groups of a size do the same at the same time, as on a machine that is full; the slowest counts.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scaling import COLUMNS

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts

import attention_gpu_ours as own
import gpu
from step import TEXT_TOKENS
from step_model import CHANNELS, MODELS, TEXT_DIM, Model, transformer
from step_ours import DTYPE, Ours

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.device import bind
from hpcdit.group import Group
from hpcdit.mesh import cut
from hpcdit.spans import Spans

REPEAT = 3  # timed calls, after one that is not
LAYERS = 2, 6  # of a model that are timed, for a line to the whole
TINY = Model(heads=4, ffn_dim=256, layers=4, timed=2)


@dataclass(frozen=True)
class Sizes:
    """lengths, heads: of attention; videos: (height, width) of the steps; frames: of these."""

    lengths: tuple[int, ...] = (8 << 10, 32 << 10, 128 << 10)
    heads: tuple[int, ...] = (24, 40)
    videos: tuple[tuple[int, int], ...] = ((480, 832), (720, 1280))
    frames: int = 81
    model: Model = MODELS["14b"]


SMALL = Sizes((512,), (8,), ((64, 96),), 9, TINY)


@dataclass
class Bench:
    world: World
    ours: Ours
    sizes: Sizes
    rows: Path
    end: float  # of time.monotonic, after which nothing new is begun

    def late(self) -> bool:
        return bool(self.world.largest(time.monotonic() > self.end, gpu.WHAT))

    def seconds(self, call: Callable[[], object], device: Any) -> float:
        """The median of a few, of the slowest rank of the world."""
        found = []
        for _ in range(1 + REPEAT):
            self.world.barrier(gpu.WHAT)
            start = time.perf_counter()
            call()
            device.synchronize()
            found.append(time.perf_counter() - start)
        return self.world.largest(statistics.median(found[1:]), gpu.WHAT)

    def tell(self, *values: object) -> None:
        """Writes a row, by the world's first rank."""
        if self.world.rank == 0:
            new = not self.rows.exists()
            with self.rows.open("a", newline="") as file:
                csv.writer(file).writerows([COLUMNS] * new + [values])
            print("  ".join(str(v) for v in values), flush=True)


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


def attention(bench: Bench, group: Group, first: dict[Shape, float]) -> None:
    """All layouts on groups of this size. first: what one rank takes, which the first call notes."""
    device, n = bench.ours.device, group.size
    for nodes in powers(n):
        cluster = Cluster(group, ranks_per_node=n // nodes)
        transport = bench.ours.network.transport(cluster)
        costs = own.calibrate(cluster, transport, device, DTYPE, 128)
        for shape in (Shape(1, length, heads, 128) for length in bench.sizes.lengths for heads in bench.sizes.heads):
            if bench.late():
                break
            tokens = len(cut(shape.length, n)[group.rank])
            tensors = {t: torch.randn(1, tokens, shape.heads, 128, device=device.torch).to(DTYPE) for t in "qkv"}
            auto, predicted = own.pick(cluster, costs, shape)
            for layout in dict.fromkeys([*layouts(n, nodes), auto]):
                if layout.ulysses > shape.heads:
                    continue
                spans = Spans(None, time.perf_counter)
                made = Attention(layout.schedule(), shape, transport, device.kernels, DTYPE, spans)
                count = own.layers_of(shape.length)
                call = partial(own.ours, made, transport, tensors, count)
                for _ in range(2):  # every kernel runs before it is captured
                    call()
                took = bench.seconds(device.repeated(call, 1), device) / count
                made.close()
                first.setdefault(shape, took)
                case = f"L={shape.length} H={shape.heads}"
                times = f"{first[shape] / took:.2f}"
                told = ("auto", f"{predicted * 1e3:.3f}") if layout == auto else ("", "")
                bench.tell("attention", case, n, nodes, layout, f"{took * 1e3:.3f}", times, told[1], told[0])
            if nodes == 1 < n and device.cuda:
                rivals(bench, n, shape, tensors, first[shape])
        cluster.close()


def rivals(bench: Bench, n: int, shape: Shape, tensors: dict[str, torch.Tensor], alone_s: float) -> None:
    """yunchang's USP over NCCL, where it is installed, with the quickest kernel."""
    try:
        from yunchang import (  # type: ignore[import-not-found, unused-ignore]
            LongContextAttention,
            set_seq_parallel_pg,
        )
    except ImportError:
        return
    name, attend = list(gpu.kernels().items())[-1]
    for ulysses in (u for u in powers(n) if shape.heads % u == 0):
        set_seq_parallel_pg(ulysses, n // ulysses, bench.world.rank, bench.world.size)
        # An attn_type that it does not know makes it call attn_processor.
        module = LongContextAttention(attn_type=None, attn_processor=attend)
        took = bench.seconds(partial(module, *(tensors[t] for t in "qkv")), bench.ours.device)
        case, speedup = f"L={shape.length} H={shape.heads}", f"{alone_s / took:.2f}"
        method = f"yunchang {ulysses} x {n // ulysses}, {name}"
        bench.tell("attention", case, n, 1, method, f"{took * 1e3:.3f}", speedup, "", "")


@torch.no_grad()
def steps(bench: Bench, n: int, first: dict[tuple[int, int], float]) -> None:
    """A guided step, each group of n ranks at a video of its own."""
    sizes, device = bench.sizes, bench.ours.device
    for height, width in sizes.videos:
        if bench.late():
            return
        latents = ((sizes.frames - 1) // 4 + 1, height // 8, width // 8)
        generator = torch.Generator(device.torch).manual_seed(1)
        draw = partial(torch.randn, generator=generator, device=device.torch, dtype=DTYPE)
        noise, texts = draw(1, CHANNELS, *latents), [draw(1, TEXT_TOKENS, TEXT_DIM) for _ in range(2)]
        tokens, times, note = latents[0] * latents[1] * latents[2] // 4, [], ""
        layers = [min(count, sizes.model.layers) for count in LAYERS]
        for count in layers:
            model = transformer(sizes.model, count, device.torch)
            made = bench.ours.prepare_wan(
                model, tokens, noise, texts[1], bench.world.size // n, None, sizes.model.layers
            )  # fmt: skip

            def call(model: Any = model, noise: Any = noise, texts: Any = texts) -> None:
                at = torch.tensor([500], device=device.torch)
                for text in texts:
                    model(hidden_states=noise, timestep=at, encoder_hidden_states=text, return_dict=False)

            for _ in range(2):
                call()
            times.append(bench.seconds(call, device))
            peak = bench.world.largest(device.peak_bytes(), gpu.WHAT) / 2**30
            note = f"{peak:.1f} GiB peak, {made.planned_bytes / 2**30:.1f} planned, of {count} layers"
            made.close()
            del model
        slope = (times[1] - times[0]) / (layers[1] - layers[0])
        whole = times[1] + slope * (sizes.model.layers - layers[1])
        first.setdefault((height, width), whole)
        speedup = f"{first[height, width] / whole:.2f}"
        predicted = f"{made.predicted_s * 1e3:.1f}"
        plan = replace(made.plan, replicas=1)
        bench.tell("step", f"{height}x{width}", n, n, plan, f"{whole * 1e3:.1f}", speedup, predicted, note)


def body(args: argparse.Namespace, world: World) -> None:
    device = bind("auto", world)
    if device.cuda:
        gpu.nccl(world, device.torch)
    ours = Ours(world, device)
    sizes = SMALL if args.small else Sizes()
    bench = Bench(world, ours, sizes, args.csv, time.monotonic() + args.limit_s)
    gpu.say(world, f"{world.size} x {device.name}")
    attending: dict[Shape, float] = {}
    stepping: dict[tuple[int, int], float] = {}
    for n in powers(world.size):
        group = world.part(world.size // n)
        attention(bench, group, attending)
        group.close()
        steps(bench, n, stepping)
    ours.close()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--limit-s", type=float, default=370)
    parser.add_argument("--small", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

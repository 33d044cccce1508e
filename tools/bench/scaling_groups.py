"""Steps and attention on groups of 1, 2, 4 ... of the ranks, for scaling.py, which see.

All groups of a size do the same at the same time, as on a machine that is full; the slowest counts. What is worth most
comes first, and rows are appended to a file one by one: whatever ends this process, another goes on behind it.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from textwrap import shorten
from typing import Any, TypeVar

import torch

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts

import gpu
import scaling_attention
import scaling_rows as rows
from scaling_rows import AUTO, BEGUN, Row
from step import TEXT_TOKENS
from step_model import CHANNELS, MODELS, TEXT_DIM, Model, transformer
from step_ours import DTYPE, Ours
from torch import Tensor

from hpcdit.cluster import World
from hpcdit.device import bind
from hpcdit.errors import InputError
from hpcdit.render.memory import release

T = TypeVar("T")

HEAP_BYTES = 16 << 30  # of 128k tokens and 40 heads a rank's attention takes 11 GB at most, as the planner counts
TIMED_S, MOST = 0.2, 50  # of calls that are timed, and as many before that are not: seconds, and calls at most
LONG_S = 0.5  # from which on one call is enough
LAYERS = 4, 1  # of a model that are timed, for a line to the whole: the smaller number while the GPU is warm
PARTS = {"steps": 6.0, "attention": 3.5, "rivals": 1.0}  # shares of the time; what one leaves the next ones have
TINY = Model(heads=4, ffn_dim=256, layers=4, timed=2)


@dataclass(frozen=True)
class Sizes:
    """lengths, heads: of attention; videos: (height, width) of the steps; frames, text_tokens: of these."""

    lengths: tuple[int, ...] = (8 << 10, 32 << 10, 128 << 10)
    heads: tuple[int, ...] = (24, 40)
    videos: tuple[tuple[int, int], ...] = ((720, 1280), (480, 832))
    frames: int = 81
    text_tokens: int = TEXT_TOKENS
    model: Model = MODELS["14b"]


SMALL = Sizes((128,), (8,), ((64, 96),), 9, 32, TINY)


@dataclass
class Bench:
    """What the parts share.

    turns: sizes of groups, the most worth first; done: the rows that are there, with times or without; end: of
    time.monotonic, after which nothing new is begun; late: cells that were left out because of it.
    """

    args: argparse.Namespace
    world: World
    ours: Ours
    sizes: Sizes
    turns: tuple[int, ...]
    done: dict[rows.Key, Row] = field(default_factory=dict)
    end: float = 0.0
    late: int = 0

    def cell(self, cell: Row, make: Callable[[], T], measure: Callable[[T], Row]) -> None:
        """Measures a cell, unless its row is there or the time is up. Collective over the world.

        make: what `measure` needs that takes no other rank: memory. What it raises on any rank becomes the row's note,
        and so does an InputError of `measure`, which is the same on all ranks. After any other error ranks wait for
        each other in vain: the processes end, and the last to know of one has its say in the row.
        """
        if cell.key in self.done:
            return
        if self.over():
            self.late += 1
            return
        self.tell(replace(cell, note=BEGUN))
        try:
            self.tell(measure(self.world.together(partial(_as_input, make), gpu.WHAT)))
        except InputError as error:
            self.tell(replace(cell, note=str(error)))
        except Exception as error:
            rows.add(self.args.csv, replace(cell, note=_said(error)))
            raise
        if self.ours.device.cuda:
            torch._dynamo.reset()
        release()

    def over(self) -> bool:
        """Whether the time is up. Collective over the world."""
        return bool(self.world.largest(time.monotonic() > self.end, gpu.WHAT))

    def tell(self, row: Row) -> None:
        """Notes a row, and writes it by the world's first rank."""
        self.done[row.key] = row
        if self.world.rank == 0:
            rows.add(self.args.csv, row)
            if row.note != BEGUN:
                took = f"{row.seconds * 1e3:.3f} ms" if row.seconds else "-"
                print(f"{row.what}  {row.case}  {row.ranks}  {row.nodes}  {row.asked}  {row.plan}  {took}  {row.note}")
                sys.stdout.flush()

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of some calls after as many that are not counted, of the slowest rank of the world."""
        device, world = self.ours.device, self.world

        def timed() -> float:
            start = time.perf_counter()
            call()
            device.synchronize()
            return time.perf_counter() - start

        world.barrier(gpu.WHAT)
        first = world.largest(timed(), gpu.WHAT)
        half = 1 if first > LONG_S else min(max(ceil(TIMED_S / first), 2), MOST)
        world.barrier(gpu.WHAT)
        # One after the other: ranks leave a barrier up to a millisecond apart, which short calls must not show.
        found = gpu.seconds(call, 2 * half) if device.cuda else [timed() for _ in range(2 * half)]
        return world.largest(statistics.median(found[half:]), gpu.WHAT)


def _as_input(make: Callable[[], T]) -> T:
    """What `make` returns; whatever it raises as an InputError."""
    try:
        return make()
    except Exception as error:
        raise InputError(_said(error)) from error


def _said(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 150)


# Steps


def cells(turns: tuple[int, ...], videos: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int, str]]:
    """(ranks, height, width, asked) of the steps, the most worth first: what the planner takes, then what else is."""
    for some in (turns[:2], turns[2:]):
        yield from ((n, *video, AUTO) for video in videos for n in some)
    yield from ((n, *video, cfg) for n in turns if n > 1 for video in videos for cfg in ("cfg 1", "cfg 2"))


def steps(bench: Bench) -> None:
    """A guided step, each group of n ranks at a video of its own."""
    for n, height, width, asked in cells(bench.turns, bench.sizes.videos):
        cell = Row("step", f"{height}x{width}", n, 1, asked)
        picked = bench.done.get(replace(cell, asked=AUTO).key)
        if asked != AUTO and picked and picked.seconds and ("cfg 2" in picked.plan) == (asked == "cfg 2"):
            continue  # it is the planner's own
        latents = ((bench.sizes.frames - 1) // 4 + 1, height // 8, width // 8)
        bench.cell(cell, partial(_drawn, bench, latents), partial(_step, bench, cell))


def _drawn(bench: Bench, latents: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Noise and two texts."""
    ours = bench.ours
    generator = torch.Generator(ours.device.torch).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=ours.device.torch, dtype=ours.dtype)
    return draw(1, CHANNELS, *latents), [draw(1, bench.sizes.text_tokens, TEXT_DIM) for _ in range(2)]


@torch.no_grad()
def _step(bench: Bench, cell: Row, inputs: tuple[Tensor, list[Tensor]]) -> Row:
    """Times some layers, and the line through them."""
    ours, whole, (noise, texts) = bench.ours, bench.sizes.model.layers, inputs
    frames, height, width = noise.shape[2:]
    tokens, replicas = frames * height * width // 4, bench.world.size // cell.ranks
    cfg = None if cell.asked == AUTO else int(cell.asked[-1])
    at = torch.tensor([500], device=ours.device.torch)
    times, row = list[float](), cell
    for count in LAYERS:
        model = transformer(bench.sizes.model, count, ours.device.torch, dtype=ours.dtype)
        made = ours.prepare_wan(model, tokens, noise, texts[1], replicas, cfg, whole)

        def call(model: Any = model) -> None:
            for text in texts:
                model(hidden_states=noise, timestep=at, encoder_hidden_states=text, return_dict=False)

        for _ in range(2):  # the second is captured
            call()
        times.append(bench.seconds(call))
        if row is cell:
            peak = bench.world.largest(ours.device.peak_bytes(), gpu.WHAT) / 2**30
            note = f"{peak:.1f} GiB peak, {made.planned_bytes / 2**30:.1f} planned, of {count} layers"
            row = replace(cell, plan=str(replace(made.plan, replicas=1)), predicted_s=made.predicted_s, note=note)
        made.close()
        del model, call, made
        gc.collect()
    slope = (times[0] - times[1]) / (LAYERS[0] - LAYERS[1])
    return replace(row, seconds=times[0] + slope * (whole - LAYERS[0]))


def body(args: argparse.Namespace, world: World) -> None:
    """The parts of --only, each until its share of the time that is left is over."""
    device = bind("auto", world)
    if not device.cuda and not args.small:
        raise InputError(f"there is no GPU for each of the {world.size} ranks; allowed: fewer, or --small")
    ours = Ours(world, device, None, DTYPE if device.cuda else torch.float32, HEAP_BYTES)
    if world.size > 1 and device.cuda and not ours.network.transport(ours.cluster).streams:
        raise InputError("without NVSHMEM transfers go through the hosts' memory, and that is not to be measured here")
    if device.cuda:
        torch._dynamo.config.recompile_limit = 64  # a step's blocks are others to the compiler for each model
    there = SMALL if args.small else Sizes()
    videos = rows.sizes(args.sizes) if args.sizes else there.videos
    lengths = rows.lengths(args.lengths) if args.lengths else there.lengths
    sizes, turns = replace(there, videos=videos, lengths=lengths), rows.turns(args.groups, world.size)
    done = world.agree(lambda: [list(vars(row).values()) for row in rows.read(args.csv).values()], gpu.WHAT)
    bench = Bench(args, world, ours, sizes, turns, {row.key: row for row in (Row(*values) for values in done)})
    gpu.say(world, f"{world.size} x {device.name}")
    parts = {"steps": steps, "attention": scaling_attention.ours, "rivals": scaling_attention.rivals}
    left = [name for name in parts if name in args.only.split(",")]
    while left:
        share = PARTS[left[0]] / sum(PARTS[name] for name in left)
        now = time.monotonic()
        bench.end = now + (args.until - now) * share
        parts[left.pop(0)](bench)
    if bench.late:
        gpu.say(world, f"no time was left for {bench.late} cells; the same command goes on with them")
    ours.close()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows.add_options(parser)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, a list")
    parser.add_argument("--until", type=float, required=True, help="time.monotonic(), to begin nothing after")
    return parser


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

"""One denoising step of a Wan 2.1 transformer with random weights: diffusers as it is, compiled, on several GPUs; ours.

python tools/bench/step.py --model 14b --guided                   # one GPU
mpirun -n 2 python tools/bench/step.py --model 14b --guided       # and diffusers' context parallel on two

Only some of the model's layers are made and timed, since all are alike, and half as many: what a layer takes is the
difference, and the whole model as much more as it has layers more. With --layers 40 (30) the whole model is timed.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import gpu
import step_fa3
import torch
from diffusers import ContextParallelConfig
from step_model import CHANNELS, MODELS, TEXT_DIM, transformer
from step_ours import Ours
from torch import Tensor

from hpcdit.cluster import World
from hpcdit.device import bind
from hpcdit.errors import InputError

Forward = Callable[..., Any]
Prepared = tuple[str, Forward, Callable[[], None]]  # name, what to call, what to call in the end
Prepare = Callable[[Any], Prepared]

TEXT_TOKENS = 512
GUIDANCE = 5.0


@dataclass
class Row:
    """What a variant took, of the slower GPU. first_s: its first call, compiling included; output None: it failed.

    clocks: MHz and watts of this rank's GPU; fewer: the times with so many layers less; kernels: of --profile.
    """

    name: str
    times: list[float]
    first_s: float
    peak_bytes: float
    output: Tensor | None
    note: str = ""
    clocks: str = "-"
    fewer: list[float] | None = None
    kernels: str = ""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One denoising step of a Wan 2.1 transformer, in several ways.")
    parser.add_argument("--model", choices=sorted(MODELS), default="14b")
    parser.add_argument("--size", default="480x832", help="height x width of the video")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--layers", type=int, help="that are made and timed; default: 4 of 40 (14b), 6 of 30 (1.3b)")
    parser.add_argument("--guided", action="store_true", help="two passes a step, as with a negative prompt")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--backend", default="_native_cudnn", help="diffusers' attention; native: torch chooses")
    parser.add_argument("--all-bf16", action="store_true", help="also what diffusers keeps in float32 when it loads")
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step by their time")
    parser.add_argument("--only", default="", help="variants to run, by parts of their names: 'compiled,hpcdit'")
    return parser


class Step:
    """The step of one command line on this rank's GPU."""

    def __init__(self, args: argparse.Namespace, world: World, device: torch.device) -> None:
        self.args, self.world, self.device = args, world, device
        self.model = MODELS[args.model]
        self.layers = min(self.model.timed if args.layers is None else args.layers, self.model.layers)
        self.fewer = self.layers // 2 if self.layers < self.model.layers else 0  # also timed; 0: no need
        if self.layers < 2:
            raise InputError(f"--layers: {args.layers}; allowed: 2 or more")
        try:
            height, width = (int(n) for n in args.size.split("x"))
        except ValueError:
            raise InputError(f"--size: {args.size!r} is not like 480x832") from None
        if height % 16 or width % 16 or args.frames % 4 != 1:
            raise InputError("--size: multiples of 16; --frames: a multiple of 4, and one more")
        latents = ((args.frames - 1) // 4 + 1, height // 8, width // 8)
        self.tokens = latents[0] * latents[1] * latents[2] // 4
        generator = torch.Generator(device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.noise = draw(1, CHANNELS, *latents)
        self.texts = [draw(1, TEXT_TOKENS, TEXT_DIM) for _ in range(2 if args.guided else 1)]
        self.timestep = torch.tensor([500], device=device)
        self.ours: Ours | None = None

    def build(self, layers: int) -> Any:
        model = transformer(self.model, layers, self.device, self.args.all_bf16)
        model.set_attention_backend(self.args.backend)
        return model

    @torch.no_grad()
    def __call__(self, forward: Forward) -> Tensor:
        found = [
            forward(hidden_states=self.noise, timestep=self.timestep, encoder_hidden_states=text, return_dict=False)[0]
            for text in self.texts
        ]
        if len(found) == 1:
            return found[0]
        prompt, negative = found
        return negative + GUIDANCE * (prompt - negative)

    def measure(self, name: str, prepare: Prepare) -> Row:
        """Makes transformers, prepares and times them. Nothing of them is left in the GPU's memory."""
        row = self._measure(Row(name, [], 0.0, 0.0, None), prepare, self.layers)
        if self.fewer and row.output is not None:
            row.fewer = self._measure(Row(name, [], 0.0, 0.0, None), prepare, self.fewer).times
        return row

    def _measure(self, row: Row, prepare: Prepare, layers: int) -> Row:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            row.name, forward, close = prepare(self.build(layers))
            self.world.barrier(gpu.WHAT)
            start = time.perf_counter()
            self(forward)
            torch.cuda.synchronize()
            row.first_s = time.perf_counter() - start
            output = self(forward)
            self.world.barrier(gpu.WHAT)
            with gpu.Clocks(self.device) as clocks:
                row.times = gpu.seconds(lambda: self(forward), self.args.repeat)
            row.clocks = str(clocks)
            row.peak_bytes = self.world.largest(torch.cuda.max_memory_allocated(), gpu.WHAT)
            row.output = output.clone()
            if self.args.profile and layers == self.layers:
                row.kernels = gpu.kernels_by_time(lambda: self(forward))
            close()
        except Exception as error:  # the other variants are worth something without this one
            row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if self.world.largest(row.output is None, gpu.WHAT):
            row.output = None
        return row

    def variants(self) -> list[tuple[str, Prepare]]:
        ranks = self.world.size

        def plain(name: str, spread: bool, compiled: bool, fa3: bool = False) -> tuple[str, Prepare]:
            def prepare(model: Any) -> Prepared:
                if spread:
                    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
                if compiled:
                    for block in model.blocks:
                        block.compile(dynamic=False)
                return name, model, step_fa3.instead_of(self.args.backend) if fa3 else lambda: None

            return name, prepare

        found = [plain("diffusers", False, False), plain("diffusers, blocks compiled", False, True)]
        if "FA3" in gpu.kernels():
            found.append(plain("diffusers, blocks compiled, FA3 by hand", False, True, fa3=True))
        if ranks > 1:
            spread = f"diffusers, Ulysses {ranks} over NCCL"
            found += [plain(spread, True, False), plain(f"{spread}, blocks compiled", True, True)]
        if ranks > 1:
            found.append(self._ours("hpcdit, each GPU a video", replicas=ranks, cfg=1))
        found.append(self._ours("hpcdit", replicas=1, cfg=None))
        if ranks > 1 and self.args.guided:
            found.append(self._ours("hpcdit, both passes together", replicas=1, cfg=1))
        words = [word.strip() for word in self.args.only.split(",") if word.strip()]
        # The first is what the others are compared with.
        return [each for i, each in enumerate(found) if not words or i == 0 or any(word in each[0] for word in words)]

    def _ours(self, name: str, replicas: int, cfg: int | None) -> tuple[str, Prepare]:
        def prepare(model: Any) -> Prepared:
            if self.ours is None:
                self.ours = Ours(self.world, bind("cuda", self.world))
            negative = self.texts[1] if self.args.guided else None
            made = self.ours.prepare_wan(model, self.tokens, self.noise, negative, replicas, cfg, self.model.layers)
            return f"{name}: {made.plan}, {made.planned_bytes / 2**30:.1f} GiB planned", model, made.close

        return name, prepare

    def describe(self) -> str:
        args = self.args
        passes = "guided, two passes a step" if args.guided else "one pass a step"
        whole = f"extrapolated in a line from {self.fewer} and {self.layers} layers" if self.fewer else "measured"
        kept = "all of it in bfloat16" if args.all_bf16 else "bfloat16, what diffusers keeps in float32 kept"
        return (
            f"{gpu.cards(self.world, self.device)}, diffusers {diffusers.__version__}, its attention {args.backend}\n"
            f"Wan 2.1 {args.model}, {self.layers} of its {self.model.layers} layers, random weights, {kept};"
            f" {args.frames} frames of {args.size}: {self.tokens} tokens; {passes}\n"
            f"medians of {args.repeat}, of the slowest GPU; seconds of the whole model: {whole};\n"
            "peak: of torch's own memory, weights included; planned: the same; difference: to the first line, relative;"
            " MHz, W: of rank 0's GPU while it was timed"
        )

    def whole(self, row: Row, typical: float) -> float:
        """Seconds of the whole model, from the medians of two numbers of layers. Called by all ranks together."""
        fewer = self.world.largest(statistics.median(row.fewer or [float("nan")]), gpu.WHAT) if self.fewer else typical
        a_layer = (typical - fewer) / (self.layers - self.fewer)
        return typical + a_layer * (self.model.layers - self.layers)

    def line(self, row: Row, first: Row) -> list[str]:
        """Called by all ranks together."""
        if row.output is None or first.output is None:
            return [row.name, *["-"] * 7, row.note or "failed on another rank"]
        typical = self.world.largest(statistics.median(row.times), gpu.WHAT)
        base = self.world.largest(statistics.median(first.times), gpu.WHAT)
        finite = not self.world.largest(not bool(row.output.isfinite().all()), gpu.WHAT)
        difference = self.world.largest(gpu.difference(row.output, first.output), gpu.WHAT)
        figures = (
            f"{typical * 1e3:.1f}",
            f"{self.whole(row, typical):.3f}",
            f"{base / typical:.2f}",
            f"{row.peak_bytes / 2**30:.1f}",
            f"{row.first_s:.1f}",
            f"{difference:.1e}",
            row.clocks,
        )
        return [row.name, *figures, "" if finite else "NOT FINITE"]


def body(args: argparse.Namespace, world: World) -> None:
    diffusers.utils.logging.set_verbosity_error()
    device = gpu.bind(world)
    step = Step(args, world, device)
    if world.size > 1:
        gpu.nccl(world, device)
    gpu.say(world, step.describe())
    head = [
        "variant",
        f"ms, {step.layers} layers",
        "s, whole model",
        "speed-up",
        "GiB peak",
        "first s",
        "difference",
        "MHz, W",
        "",
    ]
    rows: list[Row] = []
    lines: list[list[str]] = []
    for name, prepare in step.variants():
        rows.append(step.measure(name, prepare))
        lines.append(step.line(rows[-1], rows[0]))
        gpu.say(world, "  ... " + "  ".join(lines[-1]).rstrip())  # what is known if the run is cut off
    gpu.say(world, gpu.table(head, lines))
    for row in rows:
        if row.kernels:
            gpu.say(world, f"\n{row.name}: one step of {step.layers} layers, rank 0's kernels\n{row.kernels}")
    if step.ours is not None:
        step.ours.close()


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

"""One denoising step of a Wan 2.1 transformer with random weights: diffusers as it is, compiled, on several GPUs; ours.

python tools/bench/step.py --model 14b --guided                   # one GPU
mpirun -n 2 python tools/bench/step.py --model 14b --guided       # and diffusers' context parallel on two

Only some of the model's layers are made and timed, since all are alike; a step of the whole model is scaled from them.
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
import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from step_ours import ours
from torch import Tensor

from hpcdit.cluster import World
from hpcdit.errors import InputError

Forward = Callable[..., Any]
Prepared = tuple[str, Forward, Callable[[], None]]  # name, what to call, what to call in the end
Prepare = Callable[[Any], Prepared]

TEXT_TOKENS, TEXT_DIM, CHANNELS = 512, 4096, 16
GUIDANCE = 5.0
# Queries are so many times as long as untrained ones. With scores of spread 1 each token would attend to thousands
# alike, and the output would hardly show whether attention is right.
SHARPNESS = 3.0


@dataclass(frozen=True)
class Model:
    """A size of Wan 2.1. timed: layers that are made where --layers says nothing."""

    heads: int
    ffn_dim: int
    layers: int
    timed: int


MODELS = {"14b": Model(40, 13824, 40, 4), "1.3b": Model(12, 8960, 30, 6)}


@dataclass
class Row:
    """What a variant took, of the slower GPU. first_s: its first call, compiling included; output None: it failed."""

    name: str
    times: list[float]
    first_s: float
    peak_bytes: float
    output: Tensor | None
    note: str = ""


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
    parser.add_argument("--only", default="", help="variants to run, by parts of their names: 'compiled,hpcdit'")
    return parser


class Step:
    """The step of one command line on this rank's GPU."""

    def __init__(self, args: argparse.Namespace, world: World, device: torch.device) -> None:
        self.args, self.world, self.device = args, world, device
        self.model = MODELS[args.model]
        self.layers = min(args.layers or self.model.timed, self.model.layers)
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

    def build(self) -> Any:
        """The transformer, made on the GPU: the same weights on every rank and in every variant."""
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                model: Any = WanTransformer3DModel(
                    num_attention_heads=self.model.heads,
                    attention_head_dim=128,
                    in_channels=CHANNELS,
                    out_channels=CHANNELS,
                    text_dim=TEXT_DIM,
                    freq_dim=256,
                    ffn_dim=self.model.ffn_dim,
                    num_layers=self.layers,
                )
        finally:
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False).eval()
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(SHARPNESS)
        if self.args.all_bf16:
            model.rope.to(torch.bfloat16)
        else:  # as from_pretrained has it
            for name, parameter in model.named_parameters():
                if set(name.split(".")) & set(model._keep_in_fp32_modules):
                    parameter.data = parameter.data.float()
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
        """Makes a transformer, prepares and times it. Nothing of it is left in the GPU's memory."""
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row = Row(name, [], 0.0, 0.0, None)
        try:
            row.name, forward, close = prepare(self.build())
            self.world.barrier(gpu.WHAT)
            start = time.perf_counter()
            self(forward)
            torch.cuda.synchronize()
            row.first_s = time.perf_counter() - start
            output = self(forward)
            self.world.barrier(gpu.WHAT)
            row.times = gpu.seconds(lambda: self(forward), self.args.repeat)
            row.peak_bytes = self.world.largest(torch.cuda.max_memory_allocated(), gpu.WHAT)
            row.output = output.clone()
            close()
        except Exception as error:  # the other variants are worth something without this one
            row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if self.world.largest(row.output is None, gpu.WHAT):
            row.output = None
        return row

    def variants(self) -> list[tuple[str, Prepare]]:
        ranks = self.world.size

        def plain(name: str, spread: bool, compiled: bool) -> tuple[str, Prepare]:
            def prepare(model: Any) -> Prepared:
                if spread:
                    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
                if compiled:
                    for block in model.blocks:
                        block.compile(dynamic=False)
                return name, model, lambda: None

            return name, prepare

        found = [plain("diffusers", False, False), plain("diffusers, blocks compiled", False, True)]
        if ranks > 1:
            spread = f"diffusers, Ulysses {ranks} over NCCL"
            found += [plain(spread, True, False), plain(f"{spread}, blocks compiled", True, True)]
        found.append(("hpcdit", lambda model: ours(model, self.args, self.world, self.tokens)))
        words = [word.strip() for word in self.args.only.split(",") if word.strip()]
        # The first is what the others are compared with.
        return [each for i, each in enumerate(found) if not words or i == 0 or any(word in each[0] for word in words)]

    def describe(self) -> str:
        args = self.args
        passes = "guided, two passes a step" if args.guided else "one pass a step"
        kept = "all of it in bfloat16" if args.all_bf16 else "bfloat16, what diffusers keeps in float32 kept"
        return (
            f"{gpu.cards(self.world, self.device)}, diffusers {diffusers.__version__}, its attention {args.backend}\n"
            f"Wan 2.1 {args.model}, {self.layers} of its {self.model.layers} layers, random weights, {kept};"
            f" {args.frames} frames of {args.size}: {self.tokens} tokens; {passes}\n"
            f"medians of {args.repeat}, of the slowest GPU; seconds of the whole model:"
            f" {self.model.layers}/{self.layers} of the measured one;\n"
            "peak: of torch's own memory, weights included; difference: to the first line, relative"
        )

    def line(self, row: Row, first: Row) -> list[str]:
        """Called by all ranks together."""
        if row.output is None or first.output is None:
            return [row.name, *["-"] * 6, row.note or "failed on another rank"]
        typical = self.world.largest(statistics.median(row.times), gpu.WHAT)
        base = self.world.largest(statistics.median(first.times), gpu.WHAT)
        finite = not self.world.largest(not bool(row.output.isfinite().all()), gpu.WHAT)
        difference = self.world.largest(gpu.difference(row.output, first.output), gpu.WHAT)
        figures = (
            f"{typical * 1e3:.1f}",
            f"{typical * self.model.layers / self.layers:.3f}",
            f"{base / typical:.2f}",
            f"{row.peak_bytes / 2**30:.1f}",
            f"{row.first_s:.1f}",
            f"{difference:.1e}",
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
        "",
    ]
    rows: list[Row] = []
    lines: list[list[str]] = []
    for name, prepare in step.variants():
        rows.append(step.measure(name, prepare))
        lines.append(step.line(rows[-1], rows[0]))
        gpu.say(world, "  ... " + "  ".join(lines[-1]).rstrip())  # what is known if the run is cut off
    gpu.say(world, gpu.table(head, lines))


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

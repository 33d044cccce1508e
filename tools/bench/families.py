"""One denoising step of each family's transformer, at its real shapes: diffusers on one GPU and on several, and ours.

mpirun -n 2 python tools/bench/families.py                              # all of them: under 10 minutes
mpirun -n 2 python tools/bench/families.py --only flux-dev --compiled   # one; diffusers with compiled blocks besides
mpirun -n 2 python tools/bench/families.py --only wan2.1-14b --layers 12 --layers-mode resident,sharded,host
mpirun -n 2 python tools/bench/families.py --small                      # tiny ones, on a CPU

Weights are random, and made where they are needed. Some of a model's layers are made and timed, and half as many: the
whole model is on a line through the two. All variants of a model are there at the same time and take turns, after each
has had its calls to compile and to tune. Every row is written to --json as soon as something is known, and again in
the end: of rows of one variant the last counts, so that a call that is cut off leaves what it had.
"""

import argparse
import faulthandler
import gc
import json
import math
import os
import statistics
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts

import diffusers
import gpu
import torch
from family_models import MODELS
from family_variants import Making, Variant, layer_bytes
from step_ours import HEAP_BYTES, Ours
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpcdit.cluster import World
from hpcdit.device import bind
from hpcdit.errors import InputError
from hpcdit.transport.shelf import room

GUIDANCE = 5.0
WARM, TURN_S, MOST = 3, 0.2, 20  # calls before those that count; a turn takes so long, or so many calls
CUDNN_FIRST = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--variants", default="", help="some, by parts of their names, beside the first: 'Ring,hpcdit'")
    parser.add_argument("--all-sizes", action="store_true", help="also larger ones than the usual")
    parser.add_argument("--layers", type=int, default=0, help="that are made of each kind, a multiple of 2; 0: some")
    parser.add_argument("--layers-mode", default="", help="of resident, sharded, host: these instead of diffusers")
    parser.add_argument("--compiled", action="store_true", help="also diffusers with compiled blocks")
    parser.add_argument("--no-graph", action="store_true", help="of ours; to look for errors")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--backend", default="", help="diffusers' attention; default: cuDNN's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16; with --small float32")
    parser.add_argument("--json", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--limit-s", type=float, default=180, help="for one variant to get ready; then all ends")
    parser.add_argument("--small", action="store_true")
    return parser


class Case(Making):
    """One model at one size, on this rank."""

    @property
    def label(self) -> str:
        frames, height, width = self.size
        return f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "")

    # How they are timed

    @torch.no_grad()
    def step(self, variant: Variant) -> Tensor:
        calls = self.inputs.ours if variant.ours else self.inputs.theirs
        cudnn = self.device.cuda and self.model.attention == "torch" and not variant.ours
        with sdpa_kernel(list(CUDNN_FIRST), set_priority=True) if cudnn else nullcontext():
            found = [variant.model(**call, return_dict=False)[0] for call in calls]
        if not self.guided:
            return found[0]
        prompt, negative = found if len(found) == 2 else found[0].chunk(2)[::-1]
        return negative + GUIDANCE * (prompt - negative)

    def warm(self, variant: Variant) -> None:
        """Has a variant ready to be timed; all ranks together. How much memory that takes at most is seen here."""
        faulthandler.dump_traceback_later(self.args.limit_s, exit=True)  # what hangs is not waited for
        gc.collect()
        if self.device.cuda:
            torch.cuda.empty_cache()  # graphs have memory of their own, which others left in pieces
        before = torch.cuda.memory_allocated() if self.device.cuda else 0
        taken = self.ours.symmetric_bytes()
        try:
            if variant.model is None:
                variant.prepare(variant)
                gc.collect()
                self.device.forget_peak()  # which was that of what makes weights where a checkpoint would be read
            self.world.barrier(gpu.WHAT)
            for _ in range(WARM):
                start = time.perf_counter()
                output = self.step(variant)
                self.device.synchronize()
                took = time.perf_counter() - start
                variant.first_s = variant.first_s or took
            if not variant.times:
                variant.output = output.clone()
                variant.peak = self.device.peak_bytes() - before if self.device.cuda else 0
                variant.symmetric = self.ours.symmetric_bytes() - taken
                variant.calls = int(max(1, min(MOST, math.ceil(TURN_S / self.world.largest(took, gpu.WHAT)))))
            if self.world.largest(not bool(output.isfinite().all()), gpu.WHAT):
                variant.error = "not finite"
        except Exception as error:  # the other variants are worth something without this one
            said = str(error).strip().splitlines()
            variant.error = f"{type(error).__name__}: {said[0] if said else ''}"
        failed = self.world.largest(bool(variant.error), gpu.WHAT)
        faulthandler.cancel_dump_traceback_later()
        if failed:
            variant.error = variant.error or "failed on another rank"
            variant.model = variant.output = None

    def turn(self, variant: Variant, units: int) -> None:
        self.world.barrier(gpu.WHAT)
        start = time.perf_counter()
        for _ in range(variant.calls):
            self.step(variant)
        self.device.synchronize()
        variant.times.setdefault(units, []).append((time.perf_counter() - start) / variant.calls)

    def run(self) -> None:
        variants = self.variants()
        for variant in variants:
            self.warm(variant)
            if not variant.error:
                self.turn(variant, self.units)
            self.tell(variant, variants[0])
        for _ in range(self.args.turns - 1):
            for variant in variants:
                if not variant.error:
                    self.turn(variant, self.units)
        for variant in variants:
            if self.fewer and not variant.error:
                self.model.keep(variant.model, self.fewer, self._lists())
                if variant.ours:
                    variant.ours.anew()
                self.warm(variant)
        for _ in range(self.args.turns if self.fewer else 0):
            for variant in variants:
                if not variant.error:
                    self.turn(variant, self.fewer)
        rows = [self.tell(variant, variants[0], last=True) for variant in variants]
        gpu.say(self.world, f"\n{self.describe()}\n{gpu.table(list(rows[0]), [list(row.values()) for row in rows])}\n")
        faulthandler.dump_traceback_later(self.args.limit_s, exit=True)
        for variant in variants:
            variant.ended()
        faulthandler.cancel_dump_traceback_later()

    # What is told of them; by all ranks together

    def describe(self) -> str:
        unit = " + ".join(f"{count} {key.removeprefix('num_')}" for key, count in self.model.unit.items())
        timed = f"{self.units} and {self.fewer}" if self.fewer else f"{self.units}"
        return (
            f"{self.name}, {self.label}, {self.inputs.tokens} tokens, {'guided' if self.guided else 'one pass'},"
            f" {str(self.dtype).removeprefix('torch.')}; {timed} of {self.model.units} x ({unit}), random weights;"
            f" {self.world.size} x {self.device.name}, torch {torch.__version__}, diffusers {diffusers.__version__};"
            f" medians of {self.args.turns} turns, of the slower rank"
        )

    def _median(self, variant: Variant, units: int) -> float:
        times = variant.times.get(units)
        return self.world.largest(statistics.median(times), gpu.WHAT) if times and not variant.error else math.nan

    def tell(self, variant: Variant, first: Variant, last: bool = False) -> dict[str, str]:
        """Writes what is known of a variant to the file; returns a line of the table."""
        many, few = self._median(variant, self.units), self._median(variant, self.fewer)
        base_many, base_few = self._median(first, self.units), self._median(first, self.fewer)
        whole, base = self._whole(many, few), self._whole(base_many, base_few)
        ratio = base / whole if math.isfinite(base / whole) else base_many / many
        difference = math.nan
        if variant.output is not None and first.output is not None:
            difference = self.world.largest(gpu.difference(variant.output, first.output), gpu.WHAT)
        peak, symmetric = (self.world.largest(n, gpu.WHAT) / 2**30 for n in (variant.peak, variant.symmetric))
        row: dict[str, Any] = {
            "model": self.name, "size": self.label, "tokens": self.inputs.tokens, "guided": self.guided,
            "variant": variant.name, "plan": variant.plan,
            "predicted_s": variant.ours.predicted_s if variant.ours else None, "final": last, "ranks": self.world.size,
            "device": self.device.name, "dtype": str(self.dtype), "units": [self.fewer, self.units, self.model.units],
            "step_ms": [few * 1e3, many * 1e3], "whole_s": whole, "speedup": ratio, "peak_gib": peak,
            "symmetric_gib": symmetric, "whole_gib": self._whole_gib(variant, peak + symmetric),
            "difference": difference, "first_s": variant.first_s, "turns": len(variant.times.get(self.units, ())),
            "error": variant.error, "torch": torch.__version__, "diffusers": diffusers.__version__,
        }  # fmt: skip
        line = {
            "variant": variant.name + (f": {variant.plan}" if variant.plan else ""),
            "ms": f"{many * 1e3:.1f}",
            "s, whole": f"{whole:.3f}",
            "speed-up": f"{ratio:.2f}",
            "GiB": f"{peak:.1f}",
            "symmetric": f"{symmetric:.1f}",
            "GiB, whole": f"{row['whole_gib']:.1f}",
            "difference": f"{difference:.1e}",
            "first s": f"{variant.first_s:.1f}",
            "": variant.error[:100],
        }
        if self.world.rank == 0:
            with self.args.json.open("a") as file:
                known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                known["step_ms"] = [ms if math.isfinite(ms) else None for ms in row["step_ms"]]
                file.write(json.dumps(known) + "\n")
        if not last:
            gpu.say(self.world, f"  ... {self.name} {self.label}: " + "  ".join(line.values()).rstrip())
        return line

    def _whole(self, many: float, few: float) -> float:
        """Seconds of all units, from those of two numbers of them."""
        if not self.fewer:
            return many if self.units == self.model.units else math.nan
        return many + (many - few) / (self.units - self.fewer) * (self.model.units - self.units)

    def _whole_gib(self, variant: Variant, taken: float) -> float:
        """With the weights of all units."""
        if variant.model is None or self.args.layers_mode or not taken:
            return math.nan
        kept = self.fewer if self.fewer in variant.times or not variant.times else self.units
        blocks = [b for name in self._lists() for b in variant.model.get_submodule(name)]
        unit = sum(p.nbytes for block in blocks for p in block.parameters()) / max(kept, 1)
        return taken + (self.model.units - self.units) * unit / 2**30


def body(args: argparse.Namespace, world: World) -> None:
    diffusers.utils.logging.set_verbosity_error()
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(MODELS)
    if unknown := set(names) - set(MODELS):
        raise InputError(f"--only: {', '.join(sorted(unknown))}; allowed: {', '.join(MODELS)}")
    if unknown := set(filter(None, args.layers_mode.split(","))) - {"resident", "sharded", "host"}:
        raise InputError(f"--layers-mode: {', '.join(sorted(unknown))}; allowed: resident, sharded, host")
    if args.layers % 2 or args.layers < 0 or args.turns < 1:
        raise InputError("--layers: a multiple of 2; --turns: 1 or more")
    if args.layers_mode and (len(names) > 1 or args.all_sizes):
        raise InputError("--layers-mode: of one model at its usual size, see --only")
    device = bind("cpu" if args.small else "cuda", world)
    if world.size > 1:
        gpu.nccl(world, device.torch)
    warnings.filterwarnings("ignore", category=FutureWarning)  # diffusers' own, of torch
    with suppress(AttributeError):  # all variants are there at once, and each is another to the compiler
        torch._dynamo.config.recompile_limit = 64
    models = {name: MODELS[name].small() if args.small else MODELS[name] for name in names}
    dtype, heap = getattr(torch, args.dtype or ("float32" if args.small else "bfloat16")), HEAP_BYTES
    if "sharded" in args.layers_mode:
        sizes = layer_bytes(models[names[0]], args.layers or models[names[0]].timed, dtype)
        heap += room([int(n * 1.02) + (1 << 18) for n in sizes], world.size)
    ours = Ours(world, device, None, dtype, heap)
    for name, model in models.items():
        for size in model.sizes if args.all_sizes else model.sizes[:1]:
            Case(args, world, ours, name, size).run()
            torch._dynamo.reset()
            gc.collect()
            if device.cuda:
                torch.cuda.empty_cache()
    ours.close()


if __name__ == "__main__":
    sys.exit(gpu.run(arguments(), body))

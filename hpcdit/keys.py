"""Every key of the configuration and what it takes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcdit.command_line import shown
from hpcdit.errors import InputError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Rule:
    """What one key takes: in words, and as a test that raises ValueError or returns the value to use."""

    allowed: str
    accept: Callable[[Any], Any]
    null: str | None = None  # what null means; None: null is not allowed
    choices: tuple[str, ...] = ()  # the values, where they are a few words

    def check(self, key: str, value: object) -> Any:
        """The value as it is used. Raises InputError, naming the key and what is allowed."""
        if value is None and self.null is not None:
            return None
        try:
            return self.accept(value)
        except ValueError:
            null = f", or null ({self.null})" if self.null is not None else ""
            raise InputError(f"{key}={shown(value)}: must be {self.allowed}{null}") from None


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _integer(low: int, high: int | None = None, null: str | None = None) -> Rule:
    def accept(value: Any) -> int:
        _require(type(value) is int and low <= value and (high is None or value <= high))
        return int(value)

    span = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
    return Rule(f"the integer {span}" if low == high else f"an integer, {span}", accept, null)


def _number(above: float | None = None, most: float = 1e300, null: str | None = None) -> Rule:
    def accept(value: Any) -> float:
        _require(type(value) in (int, float) and value <= most)  # false for nan
        _require(value >= 0 if above is None else value > above)
        return float(value)

    least = "0 or more" if above is None else f"more than {above:g}"
    return Rule(f"a number, {least}{f' and up to {most:g}' * (most < 1e300)}", accept, null)


def _choice(*words: str) -> Rule:
    def accept(value: Any) -> str:
        _require(value in words)
        return str(value)

    return Rule(f"{', '.join(words[:-1])} or {words[-1]}", accept, choices=words)


def _flag(null: str | None = None) -> Rule:
    def accept(value: Any) -> bool:
        _require(type(value) is bool)
        return bool(value)

    return Rule("true or false", accept, null, choices=("true", "false"))


def _path(allowed: str, null: str | None = None) -> Rule:
    def accept(value: Any) -> str:
        _require(isinstance(value, str) and value.isprintable() and bool(value.strip()))
        return os.path.expanduser(value)

    return Rule(f"{allowed}, in printable characters", accept, null)


def _name(null: str | None = None) -> Rule:
    def accept(value: Any) -> str:
        _require(isinstance(value, str) and 0 < len(value) <= 200 and not value.startswith("."))
        _require(all(c.isalnum() or c in "._+-" for c in value))
        return str(value)

    return Rule("letters, digits and . _ + - (at most 200, not starting with a dot)", accept, null)


def _class() -> Rule:
    def accept(value: Any) -> str:
        _require(isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= 100)
        return str(value)

    return Rule("the name of a scheduler's class in diffusers", accept, null="the checkpoint's own")


def _share() -> Rule:
    def accept(value: Any) -> str:
        _require(isinstance(value, str))
        number, slash, count = value.partition("/")
        _require(bool(slash) and all(n.isascii() and n.isdecimal() and len(n) <= 5 for n in (number, count)))
        _require(int(count) >= 1 and int(number) <= int(count))
        return str(value)

    return Rule("i/n, the i-th of n shares, i from 0 or from 1, n up to 99999", accept, null="all")


def _lora() -> Rule:
    def accept(value: Any) -> list[Any]:
        _require(isinstance(value, list) and len(value) == 2 and type(value[1]) in (int, float))
        _require(-1000 <= value[1] <= 1000)
        return [_path("").accept(value[0]), float(value[1])]

    return Rule("[path, scale]: a LoRA's .safetensors file, and a number from -1000 to 1000", accept, null="none")


def _patch() -> Rule:
    def accept(value: Any) -> list[int]:
        _require(isinstance(value, list) and len(value) == 3)
        return [_integer(1).accept(number) for number in value]

    return Rule("three integers, 1 or more: frames, rows, columns", accept)


def _sampling(null: str | None = None) -> dict[str, Rule]:
    # The ceilings keep a slip of the finger from becoming an allocation that fails, or a number past 64 bits.
    return {
        "num_frames": _integer(1, 100_000, null),
        "height": _integer(1, 65_536, null),
        "width": _integer(1, 65_536, null),
        "steps": _integer(1, 1000, null),  # the noise levels that schedulers know
        "guidance_scale": _number(null=null),
        "seed": _integer(0, MAX_SEED, null),
        "fps": _integer(1, 240, null),
        "max_sequence_length": _integer(1, 4096, null),
        "scheduler": _class(),
    }


SAMPLING_RULES: Mapping[str, Rule] = _sampling()

PLANNER = "the planner chooses"
MEASURED = "measured"
ONLY_ONE = "other values are not supported yet"

RULES: Mapping[str, Rule] = {
    "mode": _choice("render", "plan", "report"),
    "prompts": _path("a .txt or .jsonl file", null="the demo's captions"),
    "resume": _flag(),
    "grace_s": _number(),
    "model.name": _name(null="the model folder's name"),
    "model.path": _path("a folder in diffusers' format", null="the demo model"),
    "model.dtype": _choice("float32", "bfloat16", "float16"),
    "model.device": _choice("auto", "cpu", "cuda"),
    "model.compile": _flag(),
    "model.graph": _flag(),
    "model.layers": _choice("resident", "sharded", "host"),
    "model.lora": _lora(),
    **{f"model.sampling.{key}": rule for key, rule in _sampling(null="its family's default").items()},
    "model.shape.layers": _integer(1, 10_000),
    "model.shape.heads": _integer(1, 10_000),
    "model.shape.head_dim": _integer(1, 10_000),
    "model.shape.ffn_dim": _integer(1, 1_000_000, null="4 x heads x head_dim"),
    "model.shape.latent_channels": _integer(1, 10_000),
    "model.shape.patch": _patch(),
    "model.shape.vae_temporal": _integer(1, 1000),
    "model.shape.vae_spatial": _integer(1, 1000),
    **{f"sampling.{key}": rule for key, rule in _sampling(null="the model's own default").items()},
    "parallel.method": _choice("auto", "torus", "tas", "usp", "ulysses", "ring"),
    "parallel.replicas": _integer(1, null=PLANNER),
    "parallel.cfg": _integer(1, 2, null=PLANNER),
    "parallel.batch": _integer(1, 10_000, null="1"),
    "parallel.pipeline": _integer(1, 1, null=f"{PLANNER}; {ONLY_ONE}"),
    "parallel.ulysses": _integer(1, null=PLANNER),
    "parallel.ring": _integer(1, null=PLANNER),
    "parallel.pieces": _integer(0, 10_000, null=PLANNER),
    "parallel.groups": _integer(1, 10_000, null=PLANNER),
    "parallel.vae": _choice("auto", "rows", "whole"),
    "transport.kind": _choice("auto", "mpi", "nvshmem"),
    "transport.inter": _choice("auto", "rma", "persistent"),
    "transport.timeout_s": _number(above=0),
    "cluster.nodes": _integer(1, null="as found"),
    "cluster.ranks_per_node": _integer(1, null="as found"),
    "cluster.costs.inter_latency_us": _number(null=MEASURED),
    "cluster.costs.inter_gb_s": _number(above=0, null=MEASURED),
    "cluster.costs.inter_spread": _number(above=0, most=1, null=MEASURED),
    "cluster.costs.inter_overlap": _number(above=0, most=1, null=MEASURED),
    "cluster.costs.intra_latency_us": _number(null=MEASURED),
    "cluster.costs.intra_gb_s": _number(above=0, null=MEASURED),
    "cluster.costs.intra_puts": _flag(null=MEASURED),
    "cluster.costs.attention_tflops": _number(above=0, null=MEASURED),
    "cluster.costs.matmul_tflops": _number(above=0, null=MEASURED),
    "cluster.costs.call_us": _number(null=MEASURED),
    "cluster.costs.lanes": _integer(1, 100_000, null=MEASURED),
    "cluster.costs.tile": _integer(1, 100_000, null=MEASURED),
    "cluster.costs.copy_gb_s": _number(above=0, null=MEASURED),
    "cluster.costs.memory_gb": _number(above=0, null=MEASURED),
    "plan.videos": _integer(1, 10_000_000, null="as many as the prompts file has, 1 without one"),
    "queue.shared": _flag(),
    "queue.share": _share(),
    "queue.stale_s": _number(above=0),
    "output.dir": _path("a folder"),
    "output.compression": _choice("gzip", "lzf", "zstd", "blosc2-zstd", "none"),
    "output.video": _choice("none", "mp4"),
    "checkpoint.seconds": _number(null="none are written"),
    "failures.max": _integer(1, null="the others go on, however many fail"),
    "trace.level": _integer(0, 2),
}

# Keys whose value is text as it stands: a path may hold spaces, commas and equals signs.
FREE_TEXT = ("prompts", "model.path", "model.name", "output.dir", "queue.share")

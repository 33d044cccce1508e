"""The ways to compute a step that `families.py` compares: diffusers' and ours, on one GPU and on several."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ContextParallelConfig
from family_models import MODELS, Inputs, Model
from step_ours import Ours, Prepared
from torch import Tensor

from hpcdit.cluster import World
from hpcdit.models.families import families
from hpcdit.planner.groups import Fixed
from hpcdit.planner.workload import Workload


@dataclass
class Variant:
    """One way to compute the step. times: of a call by number of units; error: why there are none.

    peak, symmetric: bytes of torch's memory and of NVSHMEM's that it took beside what was there.
    """

    name: str
    prepare: Callable[["Variant"], None]
    model: Any = None
    ours: Prepared | None = None
    ended: Callable[[], None] = lambda: None
    times: dict[int, list[float]] = field(default_factory=dict)
    calls: int = 1
    first_s: float = 0.0
    peak: float = 0.0
    symmetric: float = 0.0
    output: Tensor | None = None
    error: str = ""

    @property
    def plan(self) -> str:
        return str(self.ours.plan) if self.ours else ""


class Making:
    """Makes the variants of one model at one size, on this rank."""

    def __init__(
        self, args: argparse.Namespace, world: World, ours: Ours, name: str, size: tuple[int, int, int]
    ) -> None:  # fmt: skip
        self.args, self.world, self.ours, self.name, self.size = args, world, ours, name, size
        device = self.device = ours.device
        self.model: Model = MODELS[name].small() if args.small else MODELS[name]
        self.units = min(args.layers or self.model.timed, self.model.units)
        self.fewer = 0 if args.layers_mode else self.units // 2  # also timed; layers that are brought know their next
        self.dtype = ours.dtype
        generator = torch.Generator(device.torch).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device.torch, dtype=self.dtype)

        self.inputs: Inputs = self.model.inputs(self.model, size, draw)
        self.guided = self.inputs.negative is not None
        self.like = self.inputs.noise.shape

    def variants(self) -> list[Variant]:
        ranks, found = self.world.size, list[Variant]()
        if self.args.layers_mode:
            for place in self.args.layers_mode.split(","):
                if place == "resident":
                    found.append(self._own("hpcdit, resident", place, Fixed(replicas=1)))
                    found.append(self._own("hpcdit, resident, without graphs", place, Fixed(replicas=1), graph=False))
                else:
                    found.append(self._own(f"hpcdit, {place}", place, Fixed(replicas=1)))
            return found
        for compiled in (False, True)[: 1 + self.args.compiled]:
            found.append(self._theirs("", {}, compiled))
        if ranks > 1:
            found.append(self._own("hpcdit, 1 GPU", "resident", Fixed(replicas=ranks, cfg=1)))
        found.append(self._own(f"hpcdit, {ranks} GPU{'s' * (ranks > 1)}", "resident", Fixed(replicas=1)))
        if ranks > 1 and self.guided:
            found.append(self._own("hpcdit, one sequence", "resident", Fixed(replicas=1, cfg=1)))
        for compiled in (False, True)[: (1 + self.args.compiled) * (ranks > 1)]:
            found.append(self._theirs(f", Ulysses {ranks}", {"ulysses_degree": ranks}, compiled))
            found.append(self._theirs(f", Ring {ranks}", {"ring_degree": ranks}, compiled))
        words = [word.strip() for word in self.args.variants.split(",") if word.strip()]
        return [each for i, each in enumerate(found) if not (words and i) or any(word in each.name for word in words)]

    def _theirs(self, name: str, degrees: dict[str, int], compiled: bool) -> Variant:
        def prepare(variant: Variant) -> None:
            model = variant.model = self.model.build(self.units, self.device.torch, self.dtype)
            if degrees and getattr(model, "_cp_plan", None) is None:
                raise NotImplementedError("diffusers has no context parallel for it")
            if self.model.attention == "diffusers":
                model.set_attention_backend(self.args.backend or ("_native_cudnn" if self.device.cuda else "native"))
            if degrees:
                # Where there is no accelerator it divides by their number.
                with nullcontext() if self.device.cuda else patch.object(torch.accelerator, "device_count", lambda: 1):
                    model.enable_parallelism(config=ContextParallelConfig(**degrees))
            if compiled:
                for block in (block for each in self._lists() for block in model.get_submodule(each)):
                    block.compile(dynamic=False)

        return Variant(f"diffusers{name}{', compiled' * compiled}", prepare)

    def _own(self, name: str, layers: str, fixed: Fixed, graph: bool = True) -> Variant:
        def prepare(variant: Variant) -> None:
            model = variant.model = self.model.build(self.units, self.device.torch, self.dtype)
            config = self.model.config
            width = config["num_attention_heads"] * config["attention_head_dim"]
            work = Workload(
                self.inputs.tokens, config["num_attention_heads"], config["attention_head_dim"],
                self.units * sum(self.model.unit.values()), config.get("ffn_dim", 4 * width),
                videos=fixed.replicas or 1, guided=self.guided, itemsize=self.dtype.itemsize,
                text_tokens=512 if self.model.family == "wan" else 0, latents=self.inputs.noise.numel(),
                out_channels=model.proj_out.out_features, weights=sum(p.numel() for p in model.parameters()),
            )  # fmt: skip
            whole = self.model.units * sum(self.model.unit.values())
            variant.ours = self.ours.prepare(
                self.model.family, model, work, self.like, self.inputs.negative, fixed, whole, layers,
                graph and not self.args.no_graph,
            )  # fmt: skip
            variant.ended = variant.ours.close

        return Variant(name, prepare)

    def _lists(self) -> list[str]:
        return lists(self.model)


def lists(model: Model) -> list[str]:
    """The names of its lists of layers, in the order of `unit`."""
    return families()[model.family].layer_lists()


def layer_bytes(model: Model, units: int, dtype: torch.dtype) -> list[int]:
    """Of each layer of so many units."""
    made = model.build(units, torch.device("meta"), dtype)
    return [sum(p.nbytes for p in block.parameters()) for name in lists(model) for block in made.get_submodule(name)]

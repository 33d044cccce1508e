"""LoRA files: low-rank changes of a checkpoint's weights, W + scale * alpha / r * B A (arXiv 2106.09685).

Keys may be diffusers' (`transformer.blocks.0.attn1.to_q.lora_A.weight`), peft's (`base_model.model.blocks...`, with
its adapter_config.json beside it), bare, or those of a family's own tools, which diffusers converts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdit.command_line import one_line
from hpcdit.errors import InputError
from hpcdit.models.loading import ModelFolder
from hpcdit.models.weights import fingerprint, read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor

FORMS = "a LoRA of this model, in the keys of diffusers, peft or the model's authors"
DOWN, UP, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
# What the same is called by others; the last is what peft calls a bias of B.
SPELLINGS = (
    (r"\.lora_([AB])\.default\.", r".lora_\1."),
    (r"\.lora[._]down\.", ".lora_A."),
    (r"\.lora[._]up\.", ".lora_B."),
)


def with_lora(folder: ModelFolder, path: str, scale: float) -> ModelFolder:
    """The folder with a fingerprint that the LoRA is part of. Raises InputError for a file that cannot be one.

    Without torch, in milliseconds; whether its layers are the model's is found when the weights are read.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise InputError(f"model.lora: {path}: not a .safetensors file; pickled weights are never loaded")
    try:
        names = read_header(file)
    except InputError as error:
        raise InputError(f"model.lora: {str(error).removesuffix('; the checkpoint is not complete')}") from None
    if not any("lora" in name for name in names):
        raise InputError(f"model.lora: {path}: no tensor of it is a LoRA's; allowed: {FORMS}")
    name = f"{folder.fingerprint} {fingerprint(file.parent, _files(file))} {scale!r}"
    return replace(folder, fingerprint=sha256(name.encode()).hexdigest())


@dataclass(frozen=True)
class Lora:
    """path: for messages; layers: (A [r, in], B [out, r], factor) by the name of the weight, part first."""

    path: Path
    layers: Mapping[str, tuple["Tensor", "Tensor", float]]

    @classmethod
    def read(cls, path: Path, scale: float, pipeline: Any) -> "Lora":
        """pipeline: diffusers' class of the family. Raises InputError for keys of no known form."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if any(name.startswith(("diffusion_model.", "lora_unet_")) for name in tensors):
            try:
                tensors = pipeline.lora_state_dict(tensors)
            except Exception as error:  # ValueError, KeyError, whatever a conversion stumbles over
                said = one_line(f"{type(error).__name__}: {error}")[:200]
                raise InputError(f"model.lora: {path}: diffusers cannot convert it: {said}") from error
        named = {_spelled(name): tensor for name, tensor in tensors.items()}
        layers = {}
        for name in sorted(named):
            layer, found, kind = name.rpartition(".lora_A.weight")
            if found and not kind:
                down, up = named.pop(name), named.pop(f"{layer}.{UP}", None)
                if up is None or up.flatten(1).shape[1] != len(down):
                    raise InputError(f"model.lora: {path}: {name} has no {UP} of the same rank beside it")
                alpha = named.pop(f"{layer}.{ALPHA}", None)
                factor = _factor(layer, len(down), metadata, path) if alpha is None else float(alpha) / len(down)
                layers[f"{layer}.weight"] = (down, up, scale * factor)
        if named or not layers:
            what = f"the tensor {next(iter(named))!r} is" if named else "its tensors are"
            raise InputError(f"model.lora: {path}: {what} not a part of a plain LoRA; allowed: {FORMS}")
        return cls(path, layers)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError unless each layer is one of the model's. shapes: the model's tensors, part first."""
        for name, (down, up, _) in self.layers.items():
            shape, mine = shapes.get(name), (up.shape[0], *down.shape[1:])
            if shape is None or shape != mine:
                what = "the model has no such layer" if shape is None else f"the model's has shape {list(shape)}"
                raise InputError(f"model.lora: {self.path}: {name} {list(mine)}: {what}; allowed: {FORMS}")

    def touches(self, part: str) -> bool:
        """Whether a weight of this part changes."""
        return any(name.startswith(f"{part}.") for name in self.layers)

    def fused(self, name: str, weight: "Tensor") -> "Tensor":
        """The weight with its change, in float32; one without a change as it is."""
        if name not in self.layers:
            return weight
        down, up, factor = self.layers[name]
        change = up.float().flatten(1) @ down.float().flatten(1)
        return weight.float() + factor * change.view(weight.shape)


def _files(path: Path) -> list[Path]:
    config = path.with_name("adapter_config.json")
    return [path, config] if path.name == "adapter_model.safetensors" and config.exists() else [path]


def _spelled(name: str) -> str:
    """A key as diffusers writes it today."""
    name = name.removeprefix("base_model.model.")
    for other, ours in SPELLINGS:
        name = re.sub(other, ours, name)
    return name if name.startswith(("transformer.", "transformer_2.", "text_encoder")) else f"transformer.{name}"


def _factor(layer: str, rank: int, metadata: Mapping[str, str], path: Path) -> float:
    """alpha / r of a layer as the file's metadata (diffusers) or adapter_config.json (peft) says; 1 where none does."""
    part, _, module = layer.partition(".")
    try:
        if "lora_adapter_metadata" in metadata:
            packed = json.loads(metadata["lora_adapter_metadata"])
            said = {key.removeprefix(f"{part}."): value for key, value in packed.items() if key.startswith(f"{part}.")}
        else:
            said = read_json(_files(path)[1]) if len(_files(path)) > 1 else {}
        # A pattern is a module's name, or the end of it.
        patterns = said.get("alpha_pattern") or {}
        own = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
        alpha = float(next(own, said.get("lora_alpha", rank)))
        return alpha / (rank**0.5 if said.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, re.error):
        raise InputError(f"model.lora: {path}: what it says of alpha makes no sense") from None

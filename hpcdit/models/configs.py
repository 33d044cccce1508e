"""What the configuration files of a Wan checkpoint must say, and that they fit. No torch, no diffusers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NoReturn

from hpcdit.errors import InputError
from hpcdit.models.weights import read_json

COUNT = "a whole number from 1 to 1000000"
CODE = "classes of diffusers and transformers; custom code is never run"

FAMILIES = {"WanPipeline": "wan"}

# What a Wan pipeline consists of: the library that holds a component's class, and the classes supported.
# Schedulers that draw noise of their own are not among them: every rank would draw another.
COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer": ("diffusers", ("WanTransformer3DModel",)),
    "vae": ("diffusers", ("AutoencoderKLWan",)),
    "text_encoder": ("transformers", ("UMT5EncoderModel",)),
    "tokenizer": (
        "transformers",
        ("T5TokenizerFast", "T5Tokenizer", "TokenizersBackend", "PreTrainedTokenizerFast", "AutoTokenizer"),
    ),
    "scheduler": (
        "diffusers",
        (
            "UniPCMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DEISMultistepScheduler",
        ),
    ),
}

# diffusers' own defaults, for keys that an older checkpoint's config.json does not have.
TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "num_layers": 40,
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
VAE_DEFAULTS: dict[str, Any] = {
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "patch_size": None,
    "out_channels": 3,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


@dataclass(frozen=True)
class Config:
    """One configuration file: where it is, and what it says with the defaults filled in."""

    path: Path
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def need(self, key: str, good: Callable[[Any], object], allowed: str) -> None:
        """Raises InputError naming file, key, value and what is allowed, unless the value is good."""
        if not good(self[key]):
            self.refuse(key, allowed)

    def refuse(self, key: str, allowed: str) -> NoReturn:
        raise InputError(f"{self.path}: {key}: {shown(self[key])} is not supported; allowed: {allowed}")


def read_config(path: Path, defaults: dict[str, Any]) -> Config:
    """A component's configuration. Raises InputError, also for custom code and quantized weights."""
    config = Config(path, defaults | read_json(path))
    for key in ("auto_map", "trust_remote_code", "custom_pipeline"):
        config.need(key, lambda value: not value, CODE)
    config.need("quantization_config", lambda value: value is None, "none (weights in float32, bfloat16 or float16)")
    return config


def check_index(index: Config) -> str:
    """Checks model_index.json; returns the model family. Raises InputError for what is not supported."""
    if not isinstance(index["_class_name"], str):
        index.refuse("_class_name", CODE)
    index.need("_class_name", lambda name: name in FAMILIES, f"{', '.join(FAMILIES)} (text to video)")
    one = "null (one transformer, as in Wan 2.1; two experts, as in Wan 2.2 A14B, are not supported)"
    index.need("transformer_2", lambda entry: entry in (None, [None, None]), one)
    index.need("boundary_ratio", lambda ratio: ratio is None, one)
    index.need("expand_timesteps", lambda expand: not expand, "false (as in Wan 2.1; Wan 2.2 TI2V is not supported)")
    for name, (library, classes) in COMPONENTS.items():
        entry = index[name]
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            index.refuse(name, f'["{library}", "{classes[0]}"]')
        # A module of the component's folder that is called like the library would be loaded in its place.
        if entry[0] not in ("diffusers", "transformers") or (index.path.parent / name / f"{entry[0]}.py").exists():
            index.refuse(name, CODE)
        index.need(name, lambda entry: entry[0] == library and entry[1] in classes, " or ".join(classes))  # noqa: B023
    return FAMILIES[index["_class_name"]]


def check_transformer(config: Config) -> None:
    """Raises InputError unless this is a Wan text-to-video transformer's configuration."""
    _check_class(config, "transformer")
    for key in ("num_layers", "num_attention_heads", "in_channels", "text_dim", "rope_max_seq_len", "ffn_dim"):
        config.need(key, _count, COUNT)
    # The head is cut in three for the rotary embedding (frames, rows, columns), each part in pairs.
    config.need("attention_head_dim", lambda n: _count(n) and n % 2 == 0 and n >= 6, "an even number, at least 6")
    config.need("patch_size", lambda p: _counts(p) and len(p) == 3, "three whole numbers (frames, rows, columns)")
    for key in ("image_dim", "added_kv_proj_dim"):
        config.need(key, lambda value: value is None, "null (text to video; this model wants an image)")
    same = (None, config["in_channels"])
    config.need("out_channels", lambda n: n in same, f"as in_channels, {config['in_channels']}")


def check_vae(config: Config) -> None:
    """Raises InputError unless this is a Wan VAE's and its scale factors are what its layers do."""
    _check_class(config, "vae")
    config.need("z_dim", _count, COUNT)
    config.need("dim_mult", lambda mult: _counts(mult) and len(mult) <= 8, "a list of whole numbers")
    halvings = len(config["dim_mult"]) - 1
    config.need(
        "temperal_downsample",
        lambda flags: isinstance(flags, list) and [type(flag) for flag in flags] == [bool] * halvings,
        f"a list of {halvings} true or false, one fewer than dim_mult has",
    )
    config.need("patch_size", lambda patch: patch is None or _count(patch), "null or " + COUNT)
    side = config["patch_size"] or 1
    for key, made in (
        ("scale_factor_spatial", side * 2**halvings),
        ("scale_factor_temporal", 2 ** sum(config["temperal_downsample"])),
        ("out_channels", 3 * side * side),
    ):
        config.need(key, lambda factor: _count(factor) and factor == made, f"{made}, as its layers make")  # noqa: B023
    z_dim = config["z_dim"]
    numbers = f"a list of z_dim = {z_dim} numbers"
    config.need("latents_mean", lambda ns: _numbers(ns, z_dim), numbers)
    config.need("latents_std", lambda ns: _numbers(ns, z_dim) and all(ns or [1]), f"{numbers}, none 0")


def check_scheduler(config: Config) -> None:
    """Raises InputError for a scheduler that draws noise in its steps."""
    why = "every rank would draw other noise"
    config.need("stochastic_sampling", lambda flag: not flag, f"false ({why})")
    config.need("algorithm_type", lambda kind: not str(kind).startswith("sde"), f"none that starts with sde ({why})")


def check_together(transformer: Config, vae: Config, text_encoder: Config) -> None:
    """Raises InputError unless latents and text embeddings have the sizes that the transformer takes."""
    z_dim, d_model = vae["z_dim"], text_encoder["d_model"]
    transformer.need(
        "in_channels", lambda n: n == z_dim, f"{z_dim}, the VAE's z_dim (more is for models with an image)"
    )
    transformer.need("text_dim", lambda n: n == d_model, f"{shown(d_model)}, the text encoder's d_model")


def check_tensors(config: Config, tensors: dict[str, tuple[int, ...]]) -> None:
    """Raises InputError unless the transformer's weights have the layers and the width that `config` says.

    diffusers would fill what is missing with random numbers and only warn.
    """
    width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    asked = {"patch_embedding.weight": (width, config["in_channels"], *config["patch_size"])}
    asked |= {f"blocks.{i}.attn1.to_q.weight": (width, width) for i in range(layers)}
    for name, size in asked.items():
        if tensors.get(name) != size:
            found = f"has shape {list(tensors[name])}" if name in tensors else "is missing"
            raise InputError(f"{config.path.parent}: tensor {name} {found}; config.json asks for {list(size)}")
    if f"blocks.{layers}.attn1.to_q.weight" in tensors:
        raise InputError(f"{config.path}: num_layers: {layers}, but the weight files hold more layers")


def _check_class(config: Config, component: str) -> None:
    wanted = COMPONENTS[component][1][0]
    config.need("_class_name", lambda name: name in (None, wanted), wanted)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000


def _counts(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(map(_count, value))


def _numbers(value: object, length: int) -> bool:
    """Whether these are finite numbers, one a channel; diffusers' own, where there are none, are sixteen."""
    if value is None:
        return length == 16
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(n) in (int, float) and math.isfinite(n) for n in value)

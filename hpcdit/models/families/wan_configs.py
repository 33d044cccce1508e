"""What the configuration files of a Wan checkpoint must say, and that they fit."""

from reprlib import repr as shown
from typing import Any

from ..configs import COUNT, Config, check_counts, count, counts, numbers

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


def check_index(index: Config, experts: int) -> None:
    """Raises InputError unless the pipeline is of one transformer, or of two that share the steps."""
    one = "null (one transformer, as in Wan 2.1)"
    ratio = one if experts == 1 else "a number between 0 and 1: the second transformer's share of the noise levels"
    good = (lambda r: r is None) if experts == 1 else (lambda r: type(r) is float and 0 < r < 1)
    index.need("boundary_ratio", good, ratio)
    index.need("expand_timesteps", lambda flag: flag is None or type(flag) is bool, "true or false")
    if experts == 2:
        index.need("expand_timesteps", lambda flag: not flag, "false (with two transformers)")


def check_transformer(config: Config, image: bool) -> None:
    """Raises InputError unless this is a Wan transformer's configuration; image: of one that starts from a picture."""
    check_counts(config, "num_layers", "num_attention_heads", "in_channels", "text_dim", "rope_max_seq_len", "ffn_dim")
    # The head is cut in three for the rotary embedding (frames, rows, columns), each part in pairs.
    config.need("attention_head_dim", lambda n: count(n) and n % 2 == 0 and n >= 6, "an even number, at least 6")
    config.need("patch_size", lambda p: counts(p) and len(p) == 3, "three whole numbers (frames, rows, columns)")
    if image:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        added = width if config["image_dim"] else None
        config.need("image_dim", lambda n: n is None or count(n), f"null or {COUNT}")
        config.need("added_kv_proj_dim", lambda n: n == added, f"{added}, with this image_dim")
        return
    for key in ("image_dim", "added_kv_proj_dim"):
        config.need(key, lambda value: value is None, "null (text to video; this model wants an image)")
    same = (None, config["in_channels"])
    config.need("out_channels", lambda n: n in same, f"as in_channels, {config['in_channels']}")


def check_image(index: Config, transformer: Config, vae: Config, encoder: Config | None) -> None:
    """Raises InputError unless a transformer takes a picture as the pipeline gives it: as latents, and encoded."""
    z_dim = vae["z_dim"]
    taken = z_dim if index["expand_timesteps"] else 2 * z_dim + vae["scale_factor_temporal"]
    transformer.need("in_channels", lambda n: n == taken, f"{taken}, the noise, the picture's latents and their mask")
    transformer.need("out_channels", lambda n: n == z_dim, f"{z_dim}, the VAE's z_dim")
    width = encoder and encoder["hidden_size"]
    transformer.need("image_dim", lambda n: n == width, f"{width}, of the image encoder")


def check_vae(config: Config) -> None:
    """Raises InputError unless this is a Wan VAE's and its scale factors are what its layers do."""
    config.need("z_dim", count, COUNT)
    config.need("dim_mult", lambda mult: counts(mult) and len(mult) <= 8, "a list of whole numbers")
    halvings = len(config["dim_mult"]) - 1
    config.need(
        "temperal_downsample",
        lambda flags: isinstance(flags, list) and [type(flag) for flag in flags] == [bool] * halvings,
        f"a list of {halvings} true or false, one fewer than dim_mult has",
    )
    config.need("patch_size", lambda patch: patch is None or count(patch), "null or " + COUNT)
    side = config["patch_size"] or 1
    for key, made in (
        ("scale_factor_spatial", side * 2**halvings),
        ("scale_factor_temporal", 2 ** sum(config["temperal_downsample"])),
        ("out_channels", 3 * side * side),
    ):
        config.need(key, lambda factor: count(factor) and factor == made, f"{made}, as its layers make")  # noqa: B023
    z_dim = config["z_dim"]
    allowed = f"a list of z_dim = {z_dim} numbers"
    config.need("latents_mean", lambda ns: numbers(ns, z_dim), allowed)
    config.need("latents_std", lambda ns: numbers(ns, z_dim) and all(ns or [1]), f"{allowed}, none 0")


def check_latents(transformer: Config, vae: Config) -> None:
    """Raises InputError unless latents alone are what the transformer takes."""
    z_dim = vae["z_dim"]
    allowed = f"{z_dim}, the VAE's z_dim (more is for models with an image)"
    transformer.need("in_channels", lambda n: n == z_dim, allowed)


def check_text(transformer: Config, text_encoder: Config) -> None:
    """Raises InputError unless text embeddings have the size that the transformer takes."""
    d_model = text_encoder["d_model"]
    transformer.need("text_dim", lambda n: n == d_model, f"{shown(d_model)}, the text encoder's d_model")


def check_experts(first: Config, second: Config) -> None:
    """Raises InputError unless the second transformer takes and makes what the first does, in as many layers."""
    for key in TRANSFORMER_DEFAULTS:
        second.need(key, lambda value: value == first[key], f"{shown(first[key])}, as of the first transformer")  # noqa: B023

"""What the configuration files of a HunyuanVideo 1.5 checkpoint must say, and that they fit."""

from collections.abc import Mapping

from ..configs import COUNT, Config, check_counts, count

IMAGE = "HunyuanVideo15ImageToVideoPipeline"
TRANSFORMER = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "use_meanflow": False,
}
VAE = {"latent_channels": 32, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
GUIDER = {"start": 0.0, "stop": 1.0, "enabled": True, "use_original_formulation": False}


def check(index: Config, found: Mapping[str, Config]) -> None:
    """Raises InputError unless the parts fit each other, and the pipeline."""
    transformer, vae, guider = found["transformer"], found["vae"], found["guider"]
    check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim")
    check_counts(transformer, "patch_size", "patch_size_t")
    check_counts(vae, "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")
    channels, taken = vae["latent_channels"], 2 * vae["latent_channels"] + 1
    transformer.need("in_channels", lambda n: n == taken, f"{taken}, the noise, a picture's latents and their mask")
    transformer.need("out_channels", lambda n: n == channels, f"{channels}, the VAE's latent_channels")
    widths = found["text_encoder"]["hidden_size"], found["text_encoder_2"]["d_model"]
    transformer.need("text_embed_dim", lambda n: n == widths[0], f"{widths[0]}, of text_encoder")
    transformer.need("text_embed_2_dim", lambda n: n == widths[1], f"{widths[1]}, of text_encoder_2")
    for key, value in GUIDER.items():
        guider.need(key, lambda said: said == value, f"{value}")  # noqa: B023
    encoder = found.get("image_encoder")
    if index["_class_name"] != IMAGE:
        index.need("image_encoder", lambda entry: not entry, "none (text to video)")
        transformer.need("use_meanflow", lambda flag: not flag, "false (text to video)")
    elif encoder is None:
        index.refuse("image_encoder", '["transformers", "SiglipVisionModel"]')
    else:
        for key in ("image_size", "patch_size"):
            encoder.need(key, count, COUNT)
        width = encoder["hidden_size"]
        transformer.need("image_embed_dim", lambda n: n == width, f"{width}, of image_encoder")

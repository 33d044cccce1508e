"""What the configuration files of a CogVideoX checkpoint must say, and that they fit."""

from collections.abc import Mapping

from ..configs import Config, check_counts, count

IMAGE = "CogVideoXImageToVideoPipeline"
TRANSFORMER = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "patch_size": 2,
    "patch_size_t": None,
    "max_text_seq_length": 226,
    "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False,
    "ofs_embed_dim": None,
    "sample_height": 60,
    "sample_width": 90,
}
VAE = {"latent_channels": 16, "block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}


def check(index: Config, found: Mapping[str, Config]) -> None:
    """Raises InputError unless the parts fit each other, and the pipeline."""
    transformer, vae, text = found["transformer"], found["vae"], found["text_encoder"]
    check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
    check_counts(transformer, "max_text_seq_length", "sample_height", "sample_width")
    check_counts(vae, "latent_channels", "temporal_compression_ratio")
    image, channels = index["_class_name"] == IMAGE, vae["latent_channels"]
    taken, ofs = (2 * channels, "null or a whole number") if image else (channels, "null (text to video)")
    transformer.need("in_channels", lambda n: n == taken, f"{taken}, of the VAE's {channels} latent_channels")
    transformer.need("out_channels", lambda n: n == channels, f"{channels}, the VAE's latent_channels")
    transformer.need("text_embed_dim", lambda n: n == text["d_model"], f"{text['d_model']}, the text encoder's")
    transformer.need("ofs_embed_dim", lambda n: n is None or (image and count(n)), ofs)
    transformer.need("patch_size_t", lambda p: p in (None, 2), "null or 2")
    if transformer["patch_size_t"] or transformer["use_learned_positional_embeddings"]:
        transformer.need("use_rotary_positional_embeddings", lambda flag: flag is True, "true, as in 5B and 1.5")

"""Mochi text-to-video: text and video in one sequence, padding left out; a VAE of six frames a latent frame."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config, check_counts, numbers
from ..family import Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..split import Split

TRANSFORMER = {
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "in_channels": 12,
    "out_channels": None,
    "text_embed_dim": 4096,
}
VAE = {
    "latent_channels": 12,
    "spatial_expansions": [2, 2, 2],
    "temporal_expansions": [1, 2, 3],
}
CHANNELS, TEMPORAL, SPATIAL = 12, 6, 8  # MochiPipeline's own, whatever the configurations say


class Mochi(Family):
    pipelines = ("MochiPipeline",)
    components = parts(
        transformer=model("MochiTransformer3DModel", TRANSFORMER),
        vae=model("AutoencoderKLMochi", VAE),
        text_encoder=encoder("T5EncoderModel"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
    )
    masked = True

    layers: Mapping[str, str] = {"num_layers": "transformer_blocks.{}.attn1.to_q.weight"}

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae, width = found["transformer"], found["vae"], found["text_encoder"]["d_model"]
        check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        transformer.need("in_channels", lambda n: n == CHANNELS, str(CHANNELS))
        transformer.need("out_channels", lambda n: n in (None, CHANNELS), f"null or {CHANNELS}")
        transformer.need("text_embed_dim", lambda n: n == width, f"{width}, the text encoder's d_model")
        vae.need("latent_channels", lambda n: n == CHANNELS, str(CHANNELS))
        for key, factors in (("spatial_expansions", [2, 2, 2]), ("temporal_expansions", [1, 2, 3])):
            vae.need(key, lambda ns: ns == factors, f"{factors}, as the pipeline takes them to be")  # noqa: B023
        for key in ("latents_mean", "latents_std"):
            vae.need(key, lambda ns: ns is None or numbers(ns, CHANNELS), f"null or {CHANNELS} numbers")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        patch = folder.transformer["patch_size"]
        return dict(
            latent_channels=CHANNELS,
            patch=(1, patch, patch),
            vae_temporal=TEMPORAL,
            vae_spatial=SPATIAL,
            joint=True,
            least_steps=2,  # half of them are its pipeline's linear ones, and it divides by their number
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..joint import Joint, turned
        from ..split import TEXT, VIDEO, Cut, Part

        first, rotary = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}, Cut(Part.VIDEO, dim=0)
        split.blocks(model.transformer_blocks, first, {"image_rotary_emb": rotary}, mask="encoder_attention_mask")
        for block in model.transformer_blocks:
            block.attn1.processor = Joint(turned)
            split.share(block.attn1)
        split.end(model.proj_out)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        dtype = pipe.transformer.dtype
        return pipe.prepare_latents(1, CHANNELS, height, width, num_frames, dtype, pipe.device, generator)

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        config = pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return pipe.vae.decode(latents / config.scaling_factor, return_dict=False)[0]
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return pipe.vae.decode(latents * std / config.scaling_factor + mean, return_dict=False)[0]


FAMILY = Mochi()

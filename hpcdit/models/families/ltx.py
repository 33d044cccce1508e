"""LTX-Video text-to-video: tokens of single latents, both predictions of guidance in one batch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config, check_counts
from ..family import Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..split import Split

TRANSFORMER = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 28,
    "caption_channels": 4096,
}
VAE = {
    "latent_channels": 128,
    "spatio_temporal_scaling": [True, True, True, False],
    "timestep_conditioning": False,
    "patch_size": 4,
    "patch_size_t": 1,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}


class LTX(Family):
    patch = 1, 1, 1
    pipelines = ("LTXPipeline",)
    components = parts(
        transformer=model("LTXVideoTransformer3DModel", TRANSFORMER),
        vae=model("AutoencoderKLLTXVideo", VAE),
        text_encoder=encoder("T5EncoderModel"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
    )
    schedulers = ("UniPCMultistepScheduler",)

    layers: Mapping[str, str] = {"num_layers": "transformer_blocks.{}.attn1.to_q.weight"}

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae, text = found["transformer"], found["vae"], found["text_encoder"]
        check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim")
        check_counts(vae, "latent_channels", "patch_size", "patch_size_t")
        for key in ("patch_size", "patch_size_t"):
            transformer.need(key, lambda n: n == 1, "1")
        channels, width = vae["latent_channels"], text["d_model"]
        for key in ("in_channels", "out_channels"):
            transformer.need(key, lambda n: n == channels, f"{channels}, the VAE's latent_channels")
        transformer.need("caption_channels", lambda n: n == width, f"{width}, the text encoder's d_model")
        vae.need("timestep_conditioning", lambda flag: not flag, "false (a VAE that draws noise is not supported)")
        for key in ("spatial_compression_ratio", "temporal_compression_ratio"):
            vae.need(key, lambda ratio: ratio is None, "null (as its layers make)")
        scaling = vae["spatio_temporal_scaling"]
        vae.need("spatio_temporal_scaling", lambda flags: isinstance(scaling, list), "a list of true or false")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        vae = folder.vae
        halvings = sum(vae["spatio_temporal_scaling"])
        return dict(
            latent_channels=vae["latent_channels"],
            patch=self.patch,
            vae_temporal=vae["patch_size_t"] * 2**halvings,
            vae_spatial=vae["patch_size"] * 2**halvings,
            multiple=32,  # LTXPipeline.check_inputs
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..split import VIDEO

        split.blocks(model.transformer_blocks, {"hidden_states": VIDEO}, {"image_rotary_emb": VIDEO})
        for block in model.transformer_blocks:
            split.share(block.attn1)
        split.end(model.proj_out)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        import torch

        channels, ratio = pipe.transformer.config.in_channels, pipe.vae_spatial_compression_ratio
        tokens = pipe.prepare_latents(
            1, channels, height, width, num_frames, torch.float32, pipe.device, generator=generator
        )
        frames = (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
        return self.unpack(tokens, (channels, frames, height // ratio, width // ratio))

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        vae = pipe.vae
        mean, std = (x.view(1, -1, 1, 1, 1).to(latents) for x in (vae.latents_mean, vae.latents_std))
        return vae.decode(latents * std / vae.config.scaling_factor + mean, None, return_dict=False)[0]


FAMILY = LTX()

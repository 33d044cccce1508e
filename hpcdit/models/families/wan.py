"""Wan 2.1 and 2.2, from text or from text and a picture.

One transformer, two that share the steps (2.2 A14B), or a finer VAE and a timestep a token (2.2 5B).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config
from ..family import Family, encoder, model, parts, processor, scheduler, tokenizer, unscaled
from ..loading import ModelFolder
from . import wan_configs as configs

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split


IMAGE = "WanImageToVideoPipeline"


class Wan(Family):
    pipelines = "WanPipeline", IMAGE
    components = parts(
        transformer=model("WanTransformer3DModel", configs.TRANSFORMER_DEFAULTS),
        transformer_2=model("WanTransformer3DModel", configs.TRANSFORMER_DEFAULTS, needed=False),
        vae=model("AutoencoderKLWan", configs.VAE_DEFAULTS),
        text_encoder=encoder("UMT5EncoderModel"),
        image_encoder=encoder("CLIPVisionModel", needed=False),
        image_processor=processor("CLIPImageProcessor", "CLIPImageProcessorPil"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler(
            "UniPCMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DEISMultistepScheduler",
        ),
    )

    layers: Mapping[str, str] = {"num_layers": "blocks.{}.attn1.to_q.weight"}

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        configs.check_index(index, experts=1 + ("transformer_2" in found))
        image, transformer, vae = index["_class_name"] == IMAGE, found["transformer"], found["vae"]
        configs.check_transformer(transformer, image)
        if "transformer_2" in found:
            configs.check_experts(transformer, found["transformer_2"])
        configs.check_vae(vae)
        if image:
            configs.check_image(index, transformer, vae, found.get("image_encoder"))
        else:
            configs.check_latents(transformer, vae)
        configs.check_text(transformer, found["text_encoder"])

    def tensors(self, part: str, config: Config) -> Mapping[str, tuple[int, ...] | None]:
        found = super().tensors(part, config)
        if not found:
            return {}
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return {"patch_embedding.weight": (width, config["in_channels"], *config["patch_size"]), **found}

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae = folder.transformer, folder.vae
        return dict(
            latent_channels=vae["z_dim"],
            patch=tuple(transformer["patch_size"]),
            vae_temporal=vae["scale_factor_temporal"],
            vae_spatial=vae["scale_factor_spatial"],
            max_patches=transformer["rope_max_seq_len"],
            multiple=16,  # WanPipeline.check_inputs
            ffn_dim=transformer["ffn_dim"],
            image=folder.pipeline == IMAGE,
            text=512 if transformer["image_dim"] else 0,  # WanAttnProcessor: what comes before is the picture's
        )

    def split(self, model: Any, split: "Split") -> None:
        from .wan_blocks import share

        share(model, split)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = pipe.tokenizer(prompt_clean(text), verbose=False).input_ids
        encoded, _ = pipe.encode_prompt(text, None, False, max_sequence_length=limit)
        return {"prompt_embeds": encoded}, max(len(tokens) - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
        sizes = pipe.vae.config.z_dim, (num_frames - 1) // temporal + 1, height // spatial, width // spatial
        return randn_tensor((1, *sizes), generator=generator, device=pipe.device, dtype=torch.float32)

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(unscaled(pipe.vae, latents), return_dict=False)[0]


FAMILY = Wan()

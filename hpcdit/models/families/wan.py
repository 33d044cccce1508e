"""Wan 2.1 and 2.2 text-to-video: one transformer, two that share the steps (2.2 A14B), or a finer VAE (2.2 5B)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config
from ..family import Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder, ModelShape
from . import wan_configs as configs

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split


class Wan(Family):
    pipelines = ("WanPipeline",)
    components = parts(
        transformer=model("WanTransformer3DModel", configs.TRANSFORMER_DEFAULTS),
        transformer_2=model("WanTransformer3DModel", configs.TRANSFORMER_DEFAULTS, needed=False),
        vae=model("AutoencoderKLWan", configs.VAE_DEFAULTS),
        text_encoder=encoder("UMT5EncoderModel"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler(
            "UniPCMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DEISMultistepScheduler",
        ),
    )

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        configs.check_index(index, experts=1 + ("transformer_2" in found))
        configs.check_transformer(found["transformer"])
        if "transformer_2" in found:
            configs.check_experts(found["transformer"], found["transformer_2"])
        configs.check_vae(found["vae"])
        configs.check_together(found["transformer"], found["vae"], found["text_encoder"])

    def tensors(self, part: str, config: Config) -> Mapping[str, tuple[int, ...] | None]:
        if not part.startswith("transformer"):
            return {}
        width, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
        patch = {"patch_embedding.weight": (width, config["in_channels"], *config["patch_size"])}
        blocks = {f"blocks.{i}.attn1.to_q.weight": (width, width) if i < layers else None for i in range(layers + 1)}
        return {**patch, **blocks}

    def shape(self, folder: ModelFolder) -> ModelShape:
        transformer, vae = folder.transformer, folder.vae
        return ModelShape(
            layers=transformer["num_layers"],
            heads=transformer["num_attention_heads"],
            head_dim=transformer["attention_head_dim"],
            latent_channels=vae["z_dim"],
            patch=tuple(transformer["patch_size"]),
            vae_temporal=vae["scale_factor_temporal"],
            vae_spatial=vae["scale_factor_spatial"],
            max_patches=transformer["rope_max_seq_len"],
            multiple=16,  # WanPipeline.check_inputs
            ffn_dim=transformer["ffn_dim"],
        )

    def split(self, model: Any, split: "Split") -> None:
        from .wan_blocks import share

        share(model, split)

    def compile(self, transformer: Any) -> None:
        from .wan_blocks import compile_blocks

        compile_blocks(transformer)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = pipe.tokenizer(prompt_clean(text), verbose=False).input_ids
        encoded, _ = pipe.encode_prompt(text, None, False, max_sequence_length=limit)
        return {"prompt_embeds": encoded}, max(len(tokens) - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        import torch

        channels = pipe.transformer.config.in_channels
        return pipe.prepare_latents(
            1, channels, height, width, num_frames, torch.float32, pipe.device, generator=generator
        )

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        import torch

        config = pipe.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        # Dividing by the inverse instead of multiplying is what the pipeline does: the same bits.
        scaled = latents / (1 / std).to(latents) + mean.to(latents)
        return pipe.vae.decode(scaled, return_dict=False)[0]


FAMILY = Wan()

"""HunyuanVideo text-to-video: text and video in one sequence, padding left out; guidance is an input."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config, check_counts
from ..family import Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split

TRANSFORMER = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "image_condition_type": None,
}
VAE = {"latent_channels": 16, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4}


class HunyuanVideo(Family):
    pipelines = ("HunyuanVideoPipeline",)
    components = parts(
        transformer=model("HunyuanVideoTransformer3DModel", TRANSFORMER),
        vae=model("AutoencoderKLHunyuanVideo", VAE),
        text_encoder=encoder("LlamaModel"),
        text_encoder_2=encoder("CLIPTextModel"),
        tokenizer=tokenizer("LlamaTokenizerFast", "LlamaTokenizer"),
        tokenizer_2=tokenizer("CLIPTokenizer", "CLIPTokenizerFast"),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
    )
    schedulers = ("UniPCMultistepScheduler",)
    classifier_free = False
    masked = True

    layers: Mapping[str, str] = {
        "num_layers": "transformer_blocks.{}.attn.to_q.weight",
        "num_single_layers": "single_transformer_blocks.{}.attn.to_q.weight",
    }

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae = found["transformer"], found["vae"]
        check_counts(transformer, "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
        check_counts(transformer, "patch_size", "patch_size_t")
        check_counts(vae, "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")
        transformer.need("guidance_embeds", lambda flag: flag is True, "true")
        transformer.need("image_condition_type", lambda kind: kind is None, "null (text to video)")
        channels, width = vae["latent_channels"], found["text_encoder"]["hidden_size"]
        for key in ("in_channels", "out_channels"):
            transformer.need(key, lambda n: n == channels, f"{channels}, the VAE's latent_channels")
        transformer.need("text_embed_dim", lambda n: n == width, f"{width}, of text_encoder")
        pooled = found["text_encoder_2"]["hidden_size"]
        transformer.need("pooled_projection_dim", lambda n: n == pooled, f"{pooled}, of text_encoder_2")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae = folder.transformer, folder.vae
        return dict(
            latent_channels=vae["latent_channels"],
            patch=(transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]),
            vae_temporal=vae["temporal_compression_ratio"],
            vae_spatial=vae["spatial_compression_ratio"],
            multiple=16,  # HunyuanVideoPipeline.check_inputs
            joint=True,
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..split import TEXT, VIDEO, Cut, Part

        split.text_everywhere = True  # the blocks cut off the last tokens, as many as the text has
        first, rotary = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}, Cut(Part.VIDEO, dim=0)
        split.blocks(model.transformer_blocks, first, {"freqs_cis": rotary}, mask="attention_mask")
        split.blocks(model.single_transformer_blocks, None, {"image_rotary_emb": rotary}, mask="attention_mask")
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            split.share(block.attn)
        split.end(model.proj_out)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        tokens = pipe.tokenizer(TEMPLATE["template"].format(text), verbose=False).input_ids
        encoded, pooled, mask = pipe.encode_prompt(text, max_sequence_length=limit)
        found = {"prompt_embeds": encoded, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
        return found, max(len(tokens) - TEMPLATE["crop_start"] - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        import torch

        channels = pipe.transformer.config.in_channels
        return pipe.prepare_latents(1, channels, height, width, num_frames, torch.float32, pipe.device, generator)

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


FAMILY = HunyuanVideo()

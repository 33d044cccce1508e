"""HunyuanVideo 1.5 text-to-video: text, and words in quotes letter by letter, in one sequence with the video."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config, check_counts
from ..family import DIFFUSERS, Component, Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split

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
    "use_meanflow": False,
}
VAE = {"latent_channels": 32, "spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
GUIDER = {"start": 0.0, "stop": 1.0, "enabled": True, "use_original_formulation": False}
LETTERS = 256  # tokens of the words in quotes: HunyuanVideo15Pipeline's own


class HunyuanVideo15(Family):
    pipelines = ("HunyuanVideo15Pipeline",)
    components = parts(
        transformer=model("HunyuanVideo15Transformer3DModel", TRANSFORMER),
        vae=model("AutoencoderKLHunyuanVideo15", VAE),
        text_encoder=encoder("Qwen2_5_VLTextModel"),
        text_encoder_2=encoder("T5EncoderModel"),
        tokenizer=tokenizer("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        tokenizer_2=tokenizer("ByT5Tokenizer", vocabulary=False),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
        guider=Component(DIFFUSERS, ("ClassifierFreeGuidance",), config="guider_config.json", defaults=GUIDER),
    )
    schedulers = ("UniPCMultistepScheduler",)
    asked: Mapping[str, str] = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_embeds_mask": "encoder_attention_mask",
        "prompt_embeds_2": "encoder_hidden_states_2",
        "prompt_embeds_mask_2": "encoder_attention_mask_2",
    }
    masked = True
    calls_back = False

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae, guider = found["transformer"], found["vae"], found["guider"]
        check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim")
        check_counts(transformer, "patch_size", "patch_size_t")
        check_counts(vae, "latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")
        channels, taken = vae["latent_channels"], 2 * vae["latent_channels"] + 1
        transformer.need("in_channels", lambda n: n == taken, f"{taken}, the noise, a picture's latents and their mask")
        transformer.need("out_channels", lambda n: n == channels, f"{channels}, the VAE's latent_channels")
        transformer.need("use_meanflow", lambda flag: not flag, "false")
        widths = found["text_encoder"]["hidden_size"], found["text_encoder_2"]["d_model"]
        transformer.need("text_embed_dim", lambda n: n == widths[0], f"{widths[0]}, of text_encoder")
        transformer.need("text_embed_2_dim", lambda n: n == widths[1], f"{widths[1]}, of text_encoder_2")
        for key, value in GUIDER.items():
            guider.need(key, lambda said: said == value, f"{value}")  # noqa: B023

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae = folder.transformer, folder.vae
        return dict(
            latent_channels=vae["latent_channels"],
            patch=(transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]),
            vae_temporal=vae["temporal_compression_ratio"],
            vae_spatial=vae["spatial_compression_ratio"],
            joint=True,
            beside=LETTERS,
        )

    def prepare(self, pipe: Any) -> None:
        pipe.vision_num_semantic_tokens = 0  # tokens of a picture that there is not: zeros that nothing attends to

    def split(self, model: Any, split: "Split") -> None:
        from diffusers.models.embeddings import apply_rotary_emb

        from ..joint import Joint
        from ..split import TEXT, VIDEO, Cut, Part

        first, rotary = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}, Cut(Part.VIDEO, dim=0)
        split.blocks(model.transformer_blocks, first, {"freqs_cis": rotary}, mask="attention_mask")
        for block in model.transformer_blocks:
            block.attn.set_processor(Joint(lambda x, tables: apply_rotary_emb(x, tables, sequence_dim=1)))
            split.share(block.attn)
        split.end(model.proj_out)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

        said = format_text_input([text], pipe.system_message)
        tokens = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True).input_ids[0]
        pipe.tokenizer_max_length = limit
        found = zip(self.asked, pipe.encode_prompt(text), strict=True)
        return dict(found), max(len(tokens) - pipe.prompt_template_encode_start_idx - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        channels, dtype = pipe.num_channels_latents, pipe.transformer.dtype
        return pipe.prepare_latents(1, channels, height, width, num_frames, dtype, pipe.device, generator)

    def guide(self, pipe: Any, scale: float) -> dict[str, Any]:
        pipe.guider = pipe.guider.new(guidance_scale=max(scale, 1.0))  # 1: none
        return {}

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


FAMILY = HunyuanVideo15()

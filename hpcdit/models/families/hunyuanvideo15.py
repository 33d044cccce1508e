"""HunyuanVideo 1.5, from text or from text and a picture.

Text, words in quotes letter by letter, and what an encoder makes of the picture are one sequence with the video.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config
from ..family import DIFFUSERS, Component, Family, encoder, model, parts, processor, scheduler, tokenizer
from ..loading import ModelFolder
from . import hunyuanvideo15_configs as configs
from .hunyuanvideo15_configs import IMAGE

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split

LETTERS = 256  # tokens of the words in quotes: HunyuanVideo15Pipeline's own


class HunyuanVideo15(Family):
    pipelines = "HunyuanVideo15Pipeline", IMAGE
    components = parts(
        transformer=model("HunyuanVideo15Transformer3DModel", configs.TRANSFORMER),
        vae=model("AutoencoderKLHunyuanVideo15", configs.VAE),
        text_encoder=encoder("Qwen2_5_VLTextModel"),
        text_encoder_2=encoder("T5EncoderModel"),
        image_encoder=encoder("SiglipVisionModel", needed=False),
        feature_extractor=processor("SiglipImageProcessor", "SiglipImageProcessorPil"),
        tokenizer=tokenizer("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        tokenizer_2=tokenizer("ByT5Tokenizer", vocabulary=False),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
        guider=Component(DIFFUSERS, ("ClassifierFreeGuidance",), config="guider_config.json", defaults=configs.GUIDER),
    )
    schedulers = ("UniPCMultistepScheduler",)
    asked: Mapping[str, str] = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_embeds_mask": "encoder_attention_mask",
        "prompt_embeds_2": "encoder_hidden_states_2",
        "prompt_embeds_mask_2": "encoder_attention_mask_2",
    }
    masked = True
    waits = True
    calls_back = False

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        configs.check(index, found)

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae, encoder = folder.transformer, folder.vae, folder.parts.get("image_encoder")
        picture = (encoder["image_size"] // encoder["patch_size"]) ** 2 if encoder else 0
        return dict(
            latent_channels=vae["latent_channels"],
            patch=(transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]),
            vae_temporal=vae["temporal_compression_ratio"],
            vae_spatial=vae["spatial_compression_ratio"],
            joint=True,
            beside=LETTERS + picture,
            image=encoder is not None,
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

    def options(self, pipe: Any, latents: "Tensor", image: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
        if image is None:
            return {}
        # The pipeline cuts the picture to a size near the picture's own; here, to that of the video that is asked for.
        height, width = (n * pipe.vae_scale_factor_spatial for n in latents.shape[-2:])
        pipe.video_processor.calculate_default_height_width = lambda **_: (height, width)
        return {"image": image}

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


FAMILY = HunyuanVideo15()

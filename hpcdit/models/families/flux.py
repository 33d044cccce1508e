"""Flux text-to-image: text and image in one sequence, in blocks of two streams and of one; guidance is an input."""

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
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
VAE = {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]}


class Flux(Family):
    patch = 1, 2, 2  # FluxPipeline's own, whatever the configurations say
    pipelines = ("FluxPipeline",)
    components = parts(
        transformer=model("FluxTransformer2DModel", TRANSFORMER),
        vae=model("AutoencoderKL", VAE),
        text_encoder=encoder("CLIPTextModel"),
        text_encoder_2=encoder("T5EncoderModel"),
        tokenizer=tokenizer("CLIPTokenizer", "CLIPTokenizerFast"),
        tokenizer_2=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
    )
    schedulers = ("UniPCMultistepScheduler",)
    classifier_free = False

    layers: Mapping[str, str] = {
        "num_layers": "transformer_blocks.{}.attn.to_q.weight",
        "num_single_layers": "single_transformer_blocks.{}.attn.to_q.weight",
    }

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae, text = found["transformer"], found["vae"], found["text_encoder_2"]
        check_counts(transformer, "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
        check_counts(vae, "latent_channels")
        channels = 4 * vae["latent_channels"]
        transformer.need("in_channels", lambda n: n == channels, f"{channels}, of four of the VAE's latents")
        transformer.need("patch_size", lambda n: n == 1, "1")
        transformer.need("joint_attention_dim", lambda n: n == text["d_model"], f"{text['d_model']}, of text_encoder_2")
        pooled = found["text_encoder"]["hidden_size"]
        transformer.need("pooled_projection_dim", lambda n: n == pooled, f"{pooled}, of text_encoder")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        vae = folder.vae
        return dict(
            latent_channels=vae["latent_channels"],
            patch=self.patch,
            vae_temporal=1,
            vae_spatial=2 ** (len(vae["block_out_channels"]) - 1),
            images=True,
            joint=True,
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..split import TEXT, VIDEO, Cut, Part

        split.text_first = True
        rotary = {"image_rotary_emb": Cut(Part.BOTH, dim=0)}
        split.blocks(model.transformer_blocks, {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}, rotary)
        split.blocks(model.single_transformer_blocks, every=rotary)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            split.share(block.attn)
        split.end(model.proj_out)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        tokens = pipe.tokenizer_2(text, verbose=False).input_ids
        encoded, pooled, _ = pipe.encode_prompt(text, None, max_sequence_length=limit)
        return {"prompt_embeds": encoded, "pooled_prompt_embeds": pooled}, max(len(tokens) - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        channels, dtype = pipe.vae.config.latent_channels, pipe.transformer.dtype
        tokens, _ = pipe.prepare_latents(1, channels, height, width, dtype, pipe.device, generator)
        return self.unpack(tokens, (channels, 1, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor))

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        config = pipe.vae.config
        scaled = latents[:, :, 0] / config.scaling_factor + config.shift_factor
        return pipe.vae.decode(scaled, return_dict=False)[0][:, :, None]


FAMILY = Flux()

"""CogVideoX text-to-video, 2B and 5B: text and video in one sequence, both predictions of guidance in one batch."""

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
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_embed_dim": 4096,
    "num_layers": 30,
    "patch_size": 2,
    "patch_size_t": None,
    "max_text_seq_length": 226,
    "use_learned_positional_embeddings": False,
}
VAE = {"latent_channels": 16, "block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}


class CogVideoX(Family):
    pipelines = ("CogVideoXPipeline",)
    components = parts(
        transformer=model("CogVideoXTransformer3DModel", TRANSFORMER),
        vae=model("AutoencoderKLCogVideoX", VAE),
        text_encoder=encoder("T5EncoderModel"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler("CogVideoXDDIMScheduler"),  # CogVideoXDPMScheduler draws noise in its steps
    )

    layers: Mapping[str, str] = {"num_layers": "transformer_blocks.{}.attn1.to_q.weight"}

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae, text = found["transformer"], found["vae"], found["text_encoder"]
        check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        check_counts(transformer, "max_text_seq_length")
        check_counts(vae, "latent_channels", "temporal_compression_ratio")
        transformer.need("patch_size_t", lambda p: p is None, "null (CogVideoX 2B and 5B; 1.5 is not supported)")
        transformer.need("use_learned_positional_embeddings", lambda flag: not flag, "false (text to video)")
        for key in ("in_channels", "out_channels"):
            channels = vae["latent_channels"]
            transformer.need(key, lambda n: n == channels, f"{channels}, the VAE's latent_channels")  # noqa: B023
        transformer.need("text_embed_dim", lambda n: n == text["d_model"], f"{text['d_model']}, the text encoder's")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae = folder.transformer, folder.vae
        return dict(
            latent_channels=vae["latent_channels"],
            patch=(1, transformer["patch_size"], transformer["patch_size"]),
            vae_temporal=vae["temporal_compression_ratio"],
            vae_spatial=2 ** (len(vae["block_out_channels"]) - 1),
            joint=True,
            text=transformer["max_text_seq_length"],
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..split import TEXT, VIDEO, Cut, Part

        split.text_first = True
        rotary = {"image_rotary_emb": Cut(Part.VIDEO, dim=0)}
        split.blocks(model.transformer_blocks, {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}, rotary)
        for block in model.transformer_blocks:
            split.share(block.attn1)
        split.end(model.proj_out)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        tokens = pipe.tokenizer(text, verbose=False).input_ids
        encoded, _ = pipe.encode_prompt(text, None, False, max_sequence_length=limit)
        return {"prompt_embeds": encoded}, max(len(tokens) - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        channels, dtype = pipe.transformer.config.in_channels, pipe.transformer.dtype
        noise = pipe.prepare_latents(1, channels, num_frames, height, width, dtype, pipe.device, generator)
        return noise.transpose(1, 2)

    def pack(self, latents: "Tensor") -> "Tensor":
        return latents.transpose(1, 2)

    def unpack(self, latents: "Tensor", sizes: tuple[int, ...]) -> "Tensor":
        return latents.transpose(1, 2)

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents, return_dict=False)[0]


FAMILY = CogVideoX()

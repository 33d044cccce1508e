"""CogVideoX 1.0 and 1.5, from text or from text and a picture.

Text and video are one sequence, both predictions of guidance one batch. Tokens of 1.5 are of two latent frames each:
one is put before an odd number of them, and left out of the video.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config
from ..family import Family, encoder, model, parts, scheduler, tokenizer
from ..loading import ModelFolder
from . import cogvideox_configs as configs
from .cogvideox_configs import IMAGE

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split


class CogVideoX(Family):
    pipelines = "CogVideoXPipeline", IMAGE
    components = parts(
        transformer=model("CogVideoXTransformer3DModel", configs.TRANSFORMER),
        vae=model("AutoencoderKLCogVideoX", configs.VAE),
        text_encoder=encoder("T5EncoderModel"),
        tokenizer=tokenizer("T5TokenizerFast", "T5Tokenizer"),
        scheduler=scheduler("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    )

    layers: Mapping[str, str] = {"num_layers": "transformer_blocks.{}.attn1.to_q.weight"}

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        configs.check(index, found)

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        transformer, vae = folder.transformer, folder.vae
        spatial, frames = 2 ** (len(vae["block_out_channels"]) - 1), transformer["patch_size_t"] or 1
        sides = tuple(transformer[key] * spatial for key in ("sample_height", "sample_width"))
        return dict(
            latent_channels=vae["latent_channels"],
            patch=(frames, transformer["patch_size"], transformer["patch_size"]),
            vae_temporal=vae["temporal_compression_ratio"],
            vae_spatial=spatial,
            before=frames - 1,
            frame_multiple=2 * vae["temporal_compression_ratio"],  # the VAE makes three frames too many of others
            joint=True,
            text=transformer["max_text_seq_length"],
            image=folder.pipeline == IMAGE,
            only=sides if transformer["use_learned_positional_embeddings"] else None,
            most=sides if transformer["patch_size_t"] else None,  # of which the pipeline makes rotary tables
        )

    def prepare(self, pipe: Any) -> None:
        from .cogvideox_steps import prepare

        prepare(pipe)

    def resumable(self, scheduler: Any) -> Any:
        from .cogvideox_steps import remembering

        return remembering(scheduler)

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
        from diffusers.utils.torch_utils import randn_tensor

        config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
        frames = (num_frames - 1) // pipe.vae_scale_factor_temporal + (config.patch_size_t or 1)
        sizes = config.out_channels, height // spatial, width // spatial
        if config.in_channels > config.out_channels:  # first it draws the picture's latents from what the VAE says
            randn_tensor((1, sizes[0], 1, *sizes[1:]), generator, pipe.device, pipe.vae.dtype)
        return randn_tensor((1, frames, *sizes), generator, pipe.device, pipe.transformer.dtype).transpose(1, 2)

    def options(self, pipe: Any, latents: "Tensor", image: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
        from torch import Generator

        drawn = {"generator": [Generator().manual_seed(seed) for seed in seeds]}
        return drawn if image is None else {**drawn, "image": [image] * len(seeds)}

    def pack(self, latents: "Tensor") -> "Tensor":
        return latents.transpose(1, 2)

    def unpack(self, latents: "Tensor", sizes: tuple[int, ...]) -> "Tensor":
        return latents.transpose(1, 2)

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        before = (pipe.transformer.config.patch_size_t or 1) - 1
        return pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents[:, :, before:], return_dict=False)[0]


FAMILY = CogVideoX()

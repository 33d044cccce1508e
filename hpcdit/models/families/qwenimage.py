"""Qwen-Image text-to-image: text and image in one sequence, padding left out."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..configs import Config, check_counts, numbers
from ..family import Family, encoder, model, parts, scheduler, tokenizer, unscaled
from ..loading import ModelFolder

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..base import Encoding
    from ..split import Split

TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "guidance_embeds": False,
    "zero_cond_t": False,
}
VAE = {"z_dim": 16, "temperal_downsample": [False, True, True]}


class QwenImage(Family):
    patch = 1, 2, 2
    pipelines = ("QwenImagePipeline",)
    components = parts(
        transformer=model("QwenImageTransformer2DModel", TRANSFORMER),
        vae=model("AutoencoderKLQwenImage", VAE),
        text_encoder=encoder("Qwen2_5_VLForConditionalGeneration"),
        tokenizer=tokenizer("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        scheduler=scheduler("FlowMatchEulerDiscreteScheduler"),
    )
    schedulers = ("UniPCMultistepScheduler",)
    scale = "true_cfg_scale"
    asked: Mapping[str, str] = {
        "prompt_embeds": "encoder_hidden_states",
        "prompt_embeds_mask": "encoder_hidden_states_mask",
    }
    masked = True

    def check(self, index: Config, found: Mapping[str, Config]) -> None:
        transformer, vae = found["transformer"], found["vae"]
        check_counts(transformer, "num_layers", "num_attention_heads", "attention_head_dim")
        check_counts(vae, "z_dim")
        z_dim = vae["z_dim"]
        transformer.need("in_channels", lambda n: n == 4 * z_dim, f"{4 * z_dim}, of four of the VAE's latents")
        transformer.need("out_channels", lambda n: n == z_dim, f"{z_dim}, the VAE's z_dim")
        transformer.need("patch_size", lambda n: n == 2, "2")
        for key in ("guidance_embeds", "zero_cond_t"):
            transformer.need(key, lambda flag: not flag, "false (text to image, with two predictions)")
        vae.need("temperal_downsample", lambda flags: isinstance(flags, list), "a list of true or false")
        for key in ("latents_mean", "latents_std"):
            vae.need(key, lambda ns: numbers(ns, z_dim), f"a list of z_dim = {z_dim} numbers")

    def sizes(self, folder: ModelFolder) -> dict[str, Any]:
        vae = folder.vae
        return dict(
            latent_channels=vae["z_dim"],
            patch=self.patch,
            vae_temporal=1,
            vae_spatial=2 ** len(vae["temperal_downsample"]),
            images=True,
            joint=True,
        )

    def split(self, model: Any, split: "Split") -> None:
        from ..joint import Joint, turned
        from ..split import TEXT, VIDEO, Cut, Part

        split.hide(model, "encoder_hidden_states_mask")  # it would bring a number from the host, as no graph can
        # Complex numbers are what torch.compile makes no kernels for.
        model.pos_embed.register_forward_hook(lambda rope, args, made: tuple(_real(x) for x in made))
        first = {"hidden_states": VIDEO, "encoder_hidden_states": TEXT}
        rotary = {"image_rotary_emb": (Cut(Part.VIDEO, dim=0), Cut(Part.TEXT, dim=0))}
        split.blocks(model.transformer_blocks, first, rotary, mask="encoder_hidden_states_mask")
        for block in model.transformer_blocks:
            block.attn.set_processor(Joint(turned, text=True))
            split.share(block.attn)
        split.end(model.proj_out)

    def encode(self, pipe: Any, text: str, limit: int) -> "tuple[Encoding, int]":
        from torch.nn.functional import pad

        tokens = pipe.tokenizer(pipe.prompt_template_encode.format(text), verbose=False).input_ids
        encoded, _ = pipe.encode_prompt(text, max_sequence_length=limit)
        missing = limit - encoded.shape[1]  # a batch of prompts has one length
        mask = pad(encoded.new_ones(encoded.shape[:2]).long(), (0, missing))
        found = {"prompt_embeds": pad(encoded, (0, 0, 0, missing)), "prompt_embeds_mask": mask}
        return found, max(len(tokens) - pipe.prompt_template_encode_start_idx - limit, 0)

    def noise(self, pipe: Any, num_frames: int, height: int, width: int, generator: "Generator") -> "Tensor":
        channels, dtype, ratio = pipe.vae.config.z_dim, pipe.transformer.dtype, pipe.vae_scale_factor
        tokens = pipe.prepare_latents(1, channels, height, width, dtype, pipe.device, generator)
        return self.unpack(tokens, (channels, 1, height // ratio, width // ratio))

    def options(self, pipe: Any, latents: "Tensor", image: Any, seeds: tuple[int, ...]) -> dict[str, Any]:
        return {"max_sequence_length": pipe.tokenizer_max_length}  # prompts are cut already

    def decode(self, pipe: Any, latents: "Tensor") -> "Tensor":
        return pipe.vae.decode(unscaled(pipe.vae, latents), return_dict=False)[0]


def _real(turns: "Tensor") -> "tuple[Tensor, Tensor]":
    """Rotary tables of all heads, [tokens, D/2], of complex numbers, as cos and sin, [tokens, 1, D/2]."""
    return turns.real[:, None].contiguous(), turns.imag[:, None].contiguous()


FAMILY = QwenImage()

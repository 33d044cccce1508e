"""Every model family as tests see it: a tiny random checkpoint, and what diffusers' own pipeline makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpcdit.models.families import families
from tests.checkpoints import WORDS, made_of, make_wan, stretch, write_picture

PROMPTS = ('a red circle moving left on the "sea"', "grey", 3), ("the cat", "a red circle on the sky", 8)


@dataclass(frozen=True)
class Example:
    """make: writes a checkpoint; size: frames, height and width; length: max_sequence_length; scale: of guidance, in
    so many steps.

    options: how its pipeline is told beside; named: what it calls the scale, nothing where the checkpoint says it.
    sized: whether its pipeline asks for height and width, rather than take what is near to the picture's.
    schedulers: some that take the place of its own, and what they are told beside its settings.
    """

    make: Callable[[Path], object]
    size: tuple[int, int, int]
    length: int = 24
    scale: float = 4.0
    named: str = "guidance_scale"
    guided: bool = True
    images: bool = False
    image: bool = False
    sized: bool = True
    steps: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reference(
        self, folder: Path, prompt: str, negative: str, seed: int, scheduler: str = "", start: Path | None = None
    ) -> np.ndarray:
        """Levels [F, H, W, 3] of diffusers' own pipeline, on one process; by another scheduler, if one is named.

        start: a picture to start from instead of that of the checkpoint.
        """
        import diffusers
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import load_image

        pipe: Any = DiffusionPipeline.from_pretrained(folder)
        if scheduler:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(
                pipe.scheduler.config, **self.schedulers[scheduler]
            )
        pipe.set_progress_bar_config(disable=True)
        if not self.named:
            pipe.tokenizer_max_length = self.length
        sizes = {} if self.images else {"num_frames": self.size[0]}
        if self.sized:
            sizes |= {"height": self.size[1], "width": self.size[2]}
        made = pipe(
            prompt=prompt,
            **({"negative_prompt": negative} if self.guided else {}),
            **({self.named: self.scale, "max_sequence_length": self.length} if self.named else {}),
            **sizes,
            **self.options,
            **({"image": load_image(str(start or picture(folder)))} if self.image else {}),
            num_inference_steps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        )
        frames = made.images if self.images else made.frames[0]
        return (frames * 255).round().astype(np.uint8)


def pipeline_of(name: str) -> str:
    """diffusers' pipeline class of an example's checkpoint."""
    family = max((family for family in families() if name.startswith(family)), key=len)
    return families()[family].pipelines[EXAMPLES[name].image]


def picture(folder: Path) -> Path:
    """The picture that videos of the checkpoint in `folder` start from."""
    path = folder.with_suffix(".png")
    return path if path.exists() else write_picture(path, (80, 50))


def t5(width: int, vocabulary: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=width, d_kv=4, d_ff=20, num_layers=1, num_heads=3))


def clip(width: int, vocabulary: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": width, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, eos_token_id=1, **sizes))


def make(folder: Path, build: Callable[[Any], Any]) -> None:
    """Writes the pipeline that `build` makes of a tokenizer: random, every part of its transformer of weight."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        pipe = build(made_of(WORDS, 77))
        for name, weight in pipe.transformer.named_parameters():
            if ".linear." in name or "scale_shift" in name or "_mod." in name:  # gates are open
                weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else 0.1))
            elif "to_q" in name or "to_k" in name or "to_v" in name or "add_" in name or "proj_out" in name:
                weight.mul_(2.0)
        of = pipe.vae.config
        channels = of.get("latent_channels") or of.z_dim
        stretch(pipe.vae, torch.randn(1, channels, *((2, 4, 6) if type(pipe.vae).__name__[-2:] != "KL" else (4, 6))))
        pipe.save_pretrained(folder)


def cogvideox(tokenizer: Any, rotary: bool = True, image: bool = False, dpm: bool = False, **more: Any) -> Any:
    """rotary: else with sines; image: from a picture; dpm: with the scheduler that draws noise in its steps."""
    import diffusers

    sizes = {"num_layers": 2, "sample_height": 4, "sample_width": 6, "sample_frames": 9, "max_text_seq_length": 23}
    transformer: Any = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=5,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=10,
        text_embed_dim=12,
        use_rotary_positional_embeddings=rotary,
        **sizes | more,
    )
    vae: Any = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    kind: Any = diffusers.CogVideoXDPMScheduler if dpm else diffusers.CogVideoXDDIMScheduler
    scheduler = kind(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline: Any = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return pipeline(tokenizer, t5(12, len(tokenizer)), vae, transformer, scheduler)


def flux(tokenizer: Any) -> Any:
    import diffusers

    transformer: Any = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=5,
        joint_attention_dim=12,
        pooled_projection_dim=14,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae: Any = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=0.4,
    )
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    encoders = clip(14, len(tokenizer)), tokenizer, t5(12, len(tokenizer)), tokenizer
    return diffusers.FluxPipeline(scheduler, vae, *encoders, transformer)


def ltx(tokenizer: Any) -> Any:
    import diffusers

    transformer: Any = diffusers.LTXVideoTransformer3DModel(
        in_channels=6,
        out_channels=6,
        num_attention_heads=5,
        attention_head_dim=14,
        cross_attention_dim=70,
        num_layers=2,
        caption_channels=12,
    )
    vae: Any = diffusers.AutoencoderKLLTXVideo(
        latent_channels=6,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.LTXPipeline(scheduler, vae, t5(12, len(tokenizer)), tokenizer, transformer)


def hunyuanvideo(tokenizer: Any) -> Any:
    import diffusers
    from transformers import LlamaConfig, LlamaModel

    transformer: Any = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=5,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=14,
        rope_axes_dim=(4, 6, 6),
    )
    vae: Any = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    second = clip(14, len(tokenizer)), tokenizer
    return diffusers.HunyuanVideoPipeline(llama, tokenizer, transformer, vae, scheduler, *second)


def mochi(tokenizer: Any) -> Any:
    import diffusers
    import torch

    transformer: Any = diffusers.MochiTransformer3DModel(
        num_attention_heads=5,
        attention_head_dim=14,
        num_layers=2,
        pooled_projection_dim=18,
        text_embed_dim=16,
        time_embed_dim=10,
        max_sequence_length=24,
    )
    transformer.pos_frequencies.copy_(torch.randn_like(transformer.pos_frequencies))  # fresh, they turn nothing
    vae: Any = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),  # whose norms are of 32 groups
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, vae, t5(16, len(tokenizer)), tokenizer, transformer)


def hunyuanvideo15(tokenizer: Any, image: bool = False) -> Any:
    import diffusers
    from transformers import ByT5Tokenizer, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
    from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    transformer: Any = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=5,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=14,
        image_embed_dim=6,
        rope_axes_dim=(4, 6, 6),
        target_size=40,  # of 48 x 32 pixels for a picture of 80 x 50
        task_type="i2v" if image else "t2v",
        use_meanflow=image,
    )
    vae: Any = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "rope_parameters": rope}
    llm = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text, bos_token_id=None, eos_token_id=1))
    # The pipeline cuts off as many tokens as the system's message has of the model's own tokenizer.
    system = "{{ 'the ' * 108 if message.role == 'system' else message.content }}"
    tokenizer.chat_template = "{% for message in messages %}" + system + "{% endfor %}"
    letters = ByT5Tokenizer()
    guider, scheduler = diffusers.ClassifierFreeGuidance(4.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    second = t5(14, len(letters)), letters
    parts = llm, tokenizer, transformer, vae, scheduler, *second, guider
    if not image:
        return diffusers.HunyuanVideo15Pipeline(*parts)
    sizes = {"hidden_size": 6, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionModel(SiglipVisionConfig(image_size=9, patch_size=3, **sizes))
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        *parts, vision, SiglipImageProcessor(size={"height": 9, "width": 9})
    )


def qwenimage(tokenizer: Any) -> Any:
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer: Any = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=5,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    vae: Any = diffusers.AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, -0.1, 0.0],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    )
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 12}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)


LEARNED = partial(cogvideox, image=True, use_learned_positional_embeddings=True)
PAIRS = partial(cogvideox, patch_size_t=2)
OFFSET = partial(PAIRS, image=True, ofs_embed_dim=10, dpm=True)
SMALL = 9, 32, 48


def flow(shift: float, *names: str) -> dict[str, dict[str, Any]]:
    """Schedulers for flow matching, as the documentation of diffusers makes them for its pipelines."""
    return {n: {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift} for n in names}


UNIPC, DPM, DEIS = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"
EXAMPLES = {
    "wan-experts": Example(partial(make_wan, experts=2), (5, 32, 48), schedulers=flow(3.0, UNIPC, DPM, DEIS)),
    "wan-fine": Example(
        partial(make_wan, fine=True, scheduler=UNIPC),
        (5, 64, 96),
        schedulers={"FlowMatchEulerDiscreteScheduler": {"shift": 3.0}},
    ),
    "wan-image": Example(partial(make_wan, image="encoded"), (5, 32, 48), length=512, image=True),
    "wan-image-experts": Example(partial(make_wan, image="latents", experts=2), (5, 32, 48), image=True),
    "wan-image-fine": Example(partial(make_wan, image="latents", fine=True), (5, 64, 96), image=True),
    "cogvideox-2b": Example(
        partial(make, build=partial(cogvideox, rotary=False)),
        SMALL,
        length=23,
        steps=3,
        schedulers={"CogVideoXDPMScheduler": {}},
    ),
    "cogvideox-5b": Example(
        partial(make, build=partial(cogvideox, dpm=True)),
        SMALL,
        length=23,
        steps=3,
        schedulers={"CogVideoXDDIMScheduler": {}},
    ),
    "cogvideox-image": Example(partial(make, build=LEARNED), SMALL, length=23, image=True),
    "cogvideox15": Example(partial(make, build=PAIRS), SMALL, length=23),
    "cogvideox15-image": Example(partial(make, build=OFFSET), SMALL, length=23, image=True),
    "flux": Example(partial(make, build=flux), (1, 48, 80), guided=False, images=True, schedulers=flow(1.0, UNIPC)),
    "ltx": Example(partial(make, build=ltx), (17, 96, 160), schedulers=flow(1.0, UNIPC)),
    "hunyuanvideo": Example(partial(make, build=hunyuanvideo), (5, 48, 80), guided=False, schedulers=flow(7.0, UNIPC)),
    "hunyuanvideo15": Example(
        partial(make, build=hunyuanvideo15), (5, 32, 48), length=21, named="", schedulers=flow(5.0, UNIPC)
    ),
    "hunyuanvideo15-image": Example(
        partial(make, build=partial(hunyuanvideo15, image=True)),
        (5, 32, 48),
        length=21,
        named="",
        image=True,
        sized=False,
    ),
    "mochi": Example(partial(make, build=mochi), (7, 32, 48), length=23),
    "qwenimage": Example(
        partial(make, build=qwenimage),
        (1, 48, 80),
        named="true_cfg_scale",
        images=True,
        schedulers=flow(1.0, UNIPC),
    ),
}

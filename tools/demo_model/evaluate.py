"""What a stage has learned so far, on what it has never seen."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import models, whole
from .captions import Scene, examples
from .data import draw, encode, frames
from .judge import compare, read
from .latents import generator
from .settings import Settings
from .stages import latent_statistics
from .training import Training, averaged


def figures(settings: Settings, name: str, training: Training) -> dict[str, float]:
    """By name: PSNR in dB of the VAE, or percentages of clips that show what was asked for."""
    stage = settings.stages[name]
    if stage.trains == "vae":
        return vae_figures(settings, training.average("vae"))
    pipe = rendering(settings, training.average("transformer"), training.average("text_encoder"))
    found: dict[str, float] = {}
    for label in ("", "bfloat16."):
        if label:
            _lower(pipe.transformer)
            _lower(pipe.text_encoder)
        if stage.trains == "image":
            found |= {label + key: value for key, value in image_figures(settings, pipe).items()}
            continue
        for things, count in ((1, settings.evaluation.one), (2, settings.evaluation.two)):
            if count:
                asked = examples(things, count)
                shares = judged(asked, rendered(settings, pipe, asked))
                found |= {f"{label}{things}.{key}": value for key, value in shares.items()}
    return found


def _lower(model: Any) -> None:
    """To bfloat16, but for what diffusers and transformers keep in float32 when they load a model in bfloat16."""
    kept = tuple(model._keep_in_fp32_modules or ())
    for name, weight in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            weight.data = weight.data.to(torch.bfloat16)


def vae_figures(settings: Settings, weights: dict[str, Tensor]) -> dict[str, float]:
    """Mean and worst PSNR, dB, of held-out clips of one thing and of two."""
    device = settings.on()
    vae = models.vae(settings)
    vae.load_state_dict(weights)
    whole.whole(vae).to(device)
    asked = examples(1, settings.evaluation.one) + examples(2, settings.evaluation.two)
    source, found = generator(device, settings.seed, "held out"), []
    with torch.no_grad():
        for rows in encode(asked, device).split(16):
            clips = draw(rows, settings.usual, source)
            made = whole.decode(vae, whole.encode(vae, clips)[0]).clamp(-1, 1)
            found.append(psnr(made, clips))
    values = torch.cat(found)
    return {"psnr": float(values.mean()), "psnr_worst": float(values.min())}


def psnr(made: Tensor, clips: Tensor) -> Tensor:
    """Of each of [B, ...] in [-1, 1], dB."""
    return -10 * torch.log10((made - clips).square().flatten(1).mean(1) / 4)


def rendering(settings: Settings, transformer: dict[str, Tensor], text_encoder: dict[str, Tensor]) -> Any:
    """A pipeline of trained weights, in float32, as it is exported and rendered from."""
    image = transformer["patch_embedding.weight"].shape[1] > settings.vae["z_dim"]
    mean, std = latent_statistics(settings)
    vae = models.vae(settings)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.load_state_dict(averaged(settings.folder / f"{settings.last('vae')}.safetensors", "vae"))
    model, text = models.transformer(settings, image), models.text_encoder(settings)
    model.load_state_dict(transformer)
    text.load_state_dict(text_encoder, strict=False)  # one of its weights has two names
    return models.pipeline(vae, model, text).to(settings.on())


def rendered(settings: Settings, pipe: Any, asked: Sequence[Scene], images: Tensor | None = None) -> Tensor:
    """Clips that a pipeline makes of captions, uint8 [B, T, H, W, 3]; images: first frames [B, 3, H, W] in [-1, 1]."""
    evaluation = settings.evaluation
    batch = evaluation.batch if images is None else 1  # the image pipeline takes one image
    parts = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        given = {} if images is None else {"image": (images[start : start + 1] + 1) / 2}
        noise = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(some))]
        video = pipe(
            prompt=[str(scene) for scene in some],
            negative_prompt=[""] * len(some),
            num_frames=settings.usual.frames,
            height=settings.usual.height,
            width=settings.usual.width,
            num_inference_steps=evaluation.steps,
            guidance_scale=evaluation.guidance_scale,
            max_sequence_length=evaluation.max_sequence_length,
            generator=noise,
            output_type="np",
            **given,
        ).frames
        parts.append(torch.from_numpy((np.asarray(video) * 255).round().astype(np.uint8)))
    return torch.cat(parts)


def judged(asked: Sequence[Scene], clips: Tensor) -> dict[str, float]:
    """Percentages of clips that are right, in each attribute and in all."""
    verdicts = [compare(scene, read(clip)) for scene, clip in zip(asked, clips, strict=True)]
    keys = ("colour", "shape", "motion", "ground", "things", "all")
    return {key: 100 * sum(getattr(verdict, key) for verdict in verdicts) / len(verdicts) for key in keys}


def image_figures(settings: Settings, pipe: Any) -> dict[str, float]:
    """Percentages, and how much of the first frame that was given is in the clip, dB."""
    asked = examples(1, settings.evaluation.images)
    source = generator(torch.device("cpu"), settings.seed, "images")
    given = draw(encode(asked), settings.usual, source)
    clips = rendered(settings, pipe, asked, given[:, :, 0])
    first = clips[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    truth = frames(given)[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1
    return {**judged(asked, clips), "first_frame_psnr": float(psnr(first, truth).mean())}

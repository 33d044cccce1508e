"""Wan 2.1 text-to-video, over diffusers' own pipeline.

Text encoding, noise, denoising loop, guidance and scheduler are the pipeline's. Only the transformer's blocks
are shared out: the first takes this rank's tokens alone, self-attention goes through a `Sequence`, and the
projection after the last brings all tokens together again. All of it by diffusers' and torch's public hooks.
"""

from typing import Any, Self

import diffusers
import numpy as np
import torch
import transformers
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from hpcdit.command_line import one_line
from hpcdit.errors import InputError, VideoError

from .base import Adapter, Conditions, Halves, OnStep, Sequence, Snapshot
from .encodings import Encodings
from .graphs import Passes
from .loading import WEIGHTS, ModelFolder, check_loaded, shape
from .resume import resumed, state
from .rows import cuttable
from .wan_blocks import Split, compile_blocks


class Guidance:
    """Lets each half of a group compute one of the two predictions that the pipeline asks for in each step.

    Stands for the transformer's own `forward`. The pipeline asks for the prediction with the prompt first: both halves
    then compute, the second one the prediction with the negative prompt, and swap; the second question is answered by
    what is there already.
    """

    def __init__(self, model: Any) -> None:
        self._compute = model.forward
        self._halves: Halves | None = None
        self._negative: Tensor | None = None
        self._unasked: Tensor | None = None
        model.forward = self

    def begin(self, halves: Halves | None, negative: Tensor | None) -> None:
        """For the videos at hand. Without halves or a negative prompt every question is computed as it comes."""
        self._halves = halves if negative is not None else None
        self._negative, self._unasked = negative, None

    def __call__(self, *, encoder_hidden_states: Tensor, **inputs: Any) -> Any:
        if self._halves is None or self._negative is None:
            return self._compute(encoder_hidden_states=encoder_hidden_states, **inputs)
        if self._unasked is not None:
            prediction, self._unasked = self._unasked, None
            return (prediction,)
        second = self._halves.index == 1
        text = self._negative.to(encoder_hidden_states.dtype) if second else encoder_hidden_states
        (mine,) = self._compute(encoder_hidden_states=text, **inputs)
        theirs = self._halves.swap(mine)
        first, self._unasked = (theirs, mine) if second else (mine, theirs)
        return (first,)


class Wan(Adapter):
    def __init__(self, pipe: Any, folder: ModelFolder, graph: bool = False) -> None:
        self.shape = shape(folder)
        self._pipe = pipe
        self._split = Split(pipe.transformer)
        self._passes = pipe.transformer.forward = Passes(pipe.transformer.forward, graph)
        self._guidance = Guidance(pipe.transformer)
        self._encodings = Encodings(self._encode)

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        dtype: str = "float32",
        device: torch.device | None = None,
        compiled: bool = False,
        graph: bool = False,
    ) -> Self:
        for library in (diffusers, transformers):  # n ranks would print n progress bars
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        # The VAE stays in float32, as in Wan's own examples: in half precision it shows.
        dtypes = {"default": getattr(torch, dtype), "vae": torch.float32}
        options: Any = {"dtype": dtypes, "use_safetensors": True, "local_files_only": True}
        try:
            pipe: Any = WanPipeline.from_pretrained(folder.path, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each library has its own for a folder whose parts do not fit each other
            raise InputError(f"{folder.path}: diffusers cannot load it: {one_line(str(error))}") from error
        for part in WEIGHTS:
            tensors = getattr(pipe, part).state_dict(keep_vars=True)
            check_loaded(folder, part, {name: tensor.data_ptr() for name, tensor in tensors.items()})
        pipe.set_progress_bar_config(disable=True)
        cuda = device is not None and device.type == "cuda"
        if cuda:
            pipe.to(device)
            if compiled:
                compile_blocks(pipe.transformer)
        return cls(pipe, folder, graph and cuda)

    @property
    def by_rows(self) -> bool:
        return cuttable(self._pipe.vae)

    def guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1  # as WanPipeline.do_classifier_free_guidance

    @torch.no_grad()
    def encode(self, prompt: str, negative_prompt: str, guided: bool, max_sequence_length: int) -> Conditions:
        positive, prompt_cut = self._encodings(prompt, max_sequence_length)
        if not guided:
            return Conditions(positive, None, prompt_cut)
        negative, negative_cut = self._encodings(negative_prompt, max_sequence_length)
        return Conditions(positive, negative, prompt_cut, negative_cut)

    def _encode(self, text: str, max_sequence_length: int) -> tuple[Tensor, int]:
        tokens = self._pipe.tokenizer(prompt_clean(text), verbose=False).input_ids
        encoded, _ = self._pipe.encode_prompt(text, None, False, max_sequence_length=max_sequence_length)
        return encoded, max(len(tokens) - max_sequence_length, 0)

    def noise(self, seed: int, num_frames: int, height: int, width: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        channels, device = self._pipe.transformer.config.in_channels, self._pipe.device
        return self._pipe.prepare_latents(
            1, channels, height, width, num_frames, torch.float32, device, generator=generator
        )

    def denoise(
        self,
        conditions: Conditions,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        sequence: Sequence,
        on_step: OnStep,
        halves: Halves | None = None,
        start: Snapshot | None = None,
    ) -> Tensor:
        guided = self.guided(guidance_scale)
        if guided and conditions.negative is None:
            raise ValueError(f"guidance_scale {guidance_scale} wants conditions encoded with guided=True")

        def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            def snapshot() -> Snapshot:
                latents = tensors["latents"].to("cpu", copy=True)
                return Snapshot(first + step + 1, latents, state(pipe.scheduler))

            on_step(first + step, snapshot)
            return {}

        first, latents = (0, noise) if start is None else (start.step, start.latents.to(noise.device))
        frames, rows, columns = noise.shape[2:]
        self._split.sequence = sequence
        self._passes.begin(sequence)
        self._guidance.begin(halves, conditions.negative if guided else None)
        try:
            with resumed(self._pipe.scheduler, start, latents):
                return self._pipe(
                    prompt_embeds=conditions.prompt,
                    negative_prompt_embeds=conditions.negative,
                    latents=latents,
                    num_frames=(frames - 1) * self.shape.vae_temporal + 1,
                    height=rows * self.shape.vae_spatial,
                    width=columns * self.shape.vae_spatial,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    output_type="latent",
                    callback_on_step_end=on_step_end,
                ).frames
        finally:
            del self._split.sequence  # and with it, if nobody else holds it, its memory
            self._guidance.begin(None, None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self._pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # Dividing by the inverse instead of multiplying is what the pipeline does: the same bits.
        scaled = latents / (1 / std).to(latents) + mean.to(latents)
        video = vae.decode(scaled, return_dict=False)[0]
        frames = self._pipe.video_processor.postprocess_video(video, output_type="np")[0]
        if not np.isfinite(frames).all():
            raise VideoError("the decoded frames hold values that are not numbers")
        return (frames * 255).round().astype(np.uint8)


ADAPTER = Wan

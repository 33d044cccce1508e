"""All families' adapter, over diffusers' own pipelines.

Text encoding, noise, denoising loop, guidance and scheduler are the pipeline's. Only the transformer's blocks are
shared out, see `split`. All of it by diffusers' and torch's public hooks; what is a family's own its `Family` says.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import count
from typing import Any, Self

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

from hpcdit.command_line import one_line
from hpcdit.errors import InputError, VideoError

from .base import Adapter, Conditions, Encoding, Halves, OnStep, Sequence, Snapshot
from .encoders import leave_on_host
from .encodings import Encodings
from .families import families
from .graphs import Passes
from .guidance import Guidance
from .layers import Layers, Shelf
from .loading import ENCODERS, ModelFolder, check_loaded, shape
from .resume import resumed, state
from .rows import cuttable
from .schedulers import chosen
from .split import Split


class PipelineAdapter(Adapter):
    def __init__(self, pipe: Any, folder: ModelFolder, graph: bool = False, layers: Layers | None = None) -> None:
        self.layers = layers
        self.shape, self._family = shape(folder), families()[folder.family]
        self._pipe = pipe
        self._family.prepare(pipe)
        # Videos are decoded while pictures of the next are encoded, and Wan's VAE notes in itself how far it is.
        self._decoding = copy.copy(pipe)
        self._decoding.vae = copy.copy(pipe.vae)
        self._schedulers = {"": self._family.resumable(pipe.scheduler)}
        self._schedulers[folder.scheduler] = self._schedulers[""]
        self._splits, self._passes, self._guidances = list[Split](), list[Passes](), list[Guidance]()
        for transformer in transformers_of(pipe):
            split = Split()
            self._family.split(transformer, split)
            passes = transformer.forward = Passes(transformer.forward, graph)
            self._splits.append(split)
            self._passes.append(passes)
            self._guidances.append(Guidance(transformer, self._family.asked))
        self._encodings = Encodings(lambda text, limit: self._family.encode(pipe, text, limit))

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        dtype: str = "float32",
        device: torch.device | None = None,
        compiled: bool = False,
        graph: bool = False,
        apart: bool = False,
        encoders_apart: bool = False,
    ) -> Self:
        for library in (diffusers, transformers):  # n ranks would print n progress bars
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        # The VAE stays in float32, as in Wan's own examples: in half precision it shows.
        dtypes = {"default": getattr(torch, dtype), "vae": torch.float32}
        options: Any = {"dtype": dtypes, "use_safetensors": True, "local_files_only": True}
        try:
            pipe: Any = getattr(diffusers, folder.pipeline).from_pretrained(folder.path, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each library has its own for a folder whose parts do not fit each other
            raise InputError(f"{folder.path}: diffusers cannot load it: {one_line(str(error))}") from error
        for part in folder.weights:
            tensors = getattr(pipe, part).state_dict(keep_vars=True)
            check_loaded(folder, part, {name: tensor.data_ptr() for name, tensor in tensors.items()})
        pipe.set_progress_bar_config(disable=True)
        layers = Layers(blocks_of(pipe, folder.family)) if apart else None
        cuda = device is not None and device.type == "cuda"
        models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        for encoder in (models.pop(name) for name in ENCODERS if encoders_apart and name in models):
            leave_on_host(encoder, device or torch.device("cpu"))
        if cuda:
            for model in models.values():
                model.to(device)
            if compiled:
                for transformer in transformers_of(pipe):
                    families()[folder.family].compile(transformer)
        return cls(pipe, folder, graph and cuda, layers)

    def bring_layers(self, shelf: Shelf) -> None:
        """Has the model compute with layers that lie on `shelf`; it was loaded without them, and all ranks have put."""
        assert self.layers is not None
        self.layers.start(shelf, self._pipe.device)
        for transformer in transformers_of(self._pipe):
            for parameter in transformer.parameters():  # which may be the last that lie in a file in memory
                if not parameter.is_cuda and not self.layers.has(parameter):
                    parameter.data = parameter.data.clone()

    @property
    def by_rows(self) -> bool:
        return cuttable(self._pipe.vae)

    def guided(self, guidance_scale: float) -> bool:
        return self.shape.guided(guidance_scale)

    @torch.no_grad()
    def encode(
        self, prompt: str, negative_prompt: str, guided: bool, max_sequence_length: int, image: str = ""
    ) -> Conditions:
        picture = diffusers.utils.load_image(image) if image else None
        positive, prompt_cut = self._encodings(prompt, max_sequence_length)
        if not guided:
            return Conditions(positive, None, prompt_cut, image=picture)
        negative, negative_cut = self._encodings(negative_prompt, max_sequence_length)
        return Conditions(positive, negative, prompt_cut, negative_cut, picture)

    def noise(self, seed: int, num_frames: int, height: int, width: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        return self._family.noise(self._pipe, num_frames, height, width, generator)

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
        seeds: tuple[int, ...] = (),
        scheduler: str = "",
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

        packed = self._family.pack(noise)
        first, latents = (0, packed) if start is None else (start.step, start.latents.to(noise.device))
        negative = conditions.negative if guided else None
        self._pipe.scheduler = self._scheduler(scheduler)
        self._begin(sequence, halves, negative, noise.shape)
        try:
            with resumed(self._pipe.scheduler, start, latents), self._called_back(on_step_end):
                found = self._pipe(
                    **conditions.prompt,
                    **{f"negative_{name}": x for name, x in (negative or {}).items()},
                    **self._family.guide(self._pipe, guidance_scale),
                    **self._sizes(noise),
                    **self._family.options(self._pipe, noise, conditions.image, seeds),
                    latents=latents,
                    num_inference_steps=steps,
                    output_type="latent",
                    return_dict=False,
                    **({"callback_on_step_end": on_step_end} if self._family.calls_back else {}),
                )[0]
            return self._family.unpack(found, noise.shape[1:])
        finally:
            self._end()

    def _scheduler(self, name: str) -> Any:
        if name not in self._schedulers:
            self._schedulers[name] = self._family.resumable(chosen(name, self._schedulers[""]))
        return self._schedulers[name]

    @contextmanager
    def _called_back(self, on_step_end: Callable[..., Any]) -> Iterator[None]:
        """In the body, a pipeline that does not call back at the end of a step does so when its scheduler steps."""
        scheduler = self._pipe.scheduler
        compute, steps = scheduler.step, count()

        def step(*args: Any, **options: Any) -> Any:
            made = compute(*args, **options)
            on_step_end(self._pipe, next(steps), None, {"latents": made[0]})
            return made

        if self._family.calls_back:
            yield
            return
        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step

    def _sizes(self, latents: Tensor) -> dict[str, int]:
        """Those that the pipeline asks for: one of images has no frames, one may look at the picture for the others."""
        (frames, *sides), taken = latents.shape[2:], signature(self._pipe.__call__).parameters
        height, width = (n * self.shape.vae_spatial for n in sides)
        sizes = {"num_frames": self.shape.num_frames(frames), "height": height, "width": width}
        return {name: size for name, size in sizes.items() if name in taken}

    def _begin(self, sequence: Sequence, halves: Halves | None, negative: Encoding | None, like: torch.Size) -> None:
        for split, passes, guidance in zip(self._splits, self._passes, self._guidances, strict=True):
            split.sequence = sequence
            passes.begin(sequence)
            guidance.begin(halves, negative, like)

    def _end(self) -> None:
        for split, guidance in zip(self._splits, self._guidances, strict=True):
            del split.sequence  # and with it, if nobody else holds it, its memory
            guidance.begin(None, None, torch.Size())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        vae = self._decoding.vae
        video = self._family.decode(self._decoding, latents.to(vae.device, vae.dtype))
        frames = (video[0].permute(1, 2, 3, 0) * 0.5 + 0.5).clamp(0, 1).cpu().float().numpy()
        if not np.isfinite(frames).all():
            raise VideoError("the decoded frames hold values that are not numbers")
        return (frames * 255).round().astype(np.uint8)


def blocks_of(pipe: Any, family: str) -> list[list[Any]]:
    """Of each transformer its layers in the order in which they compute."""
    lists = families()[family].layer_lists()
    return [[b for name in lists for b in transformer.get_submodule(name)] for transformer in transformers_of(pipe)]


def transformers_of(pipe: Any) -> list[Any]:
    """The transformers of a pipeline, in the order in which they work."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [transformer for transformer in found if transformer is not None]

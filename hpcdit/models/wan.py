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
from diffusers.models.activations import GELU
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from hpcdit.command_line import one_line
from hpcdit.errors import InputError, VideoError

from .base import Adapter, Conditions, Halves, OnStep, Sequence, Snapshot
from .encodings import Encodings
from .graphs import Passes
from .loading import WEIGHTS, ModelFolder, check_loaded, shape
from .resume import resumed, state


class Split:
    """Lets a transformer compute one rank's tokens; is itself the processor of every self-attention.

    `sequence` is that of the video at hand: there while `Wan.denoise` runs.
    """

    sequence: Sequence

    def __init__(self, model: Any) -> None:
        cross = Cross(self)
        for block in model.blocks:
            block.attn1.set_processor(self)
            block.attn2.set_processor(cross)
        model.blocks[0].register_forward_pre_hook(self._keep)
        model.rope.register_forward_hook(self._cut)
        model.proj_out.register_forward_hook(self._gather)

    def _keep(self, block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, *others = args
        return (hidden_states[:, self._slice], *others)

    def _cut(self, rope: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cuts the rotary tables, [1, L, 1, D] with each value twice, down to [tokens, 1, D/2]."""
        cos, sin = tables
        return cos[0, self._slice, :, 0::2].contiguous(), sin[0, self._slice, :, 1::2].contiguous()

    def _gather(self, proj_out: Any, args: Any, output: Tensor) -> Tensor:
        return self.sequence.gather(output)

    @property
    def _slice(self) -> slice:
        return slice(self.sequence.tokens.start, self.sequence.tokens.stop)

    @torch.compiler.disable  # what it publishes, others wait for: nothing that a compiler may move
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Self-attention of [B, tokens, C]: WanAttnProcessor's steps, each part published at once."""
        for name in self.sequence.tensors:
            layer = getattr(attn, f"to_{name}")
            if name == "v":
                self.sequence.project(name, hidden_states, layer.weight, layer.bias)
            else:
                x, norm = layer(hidden_states).unflatten(2, (attn.heads, -1)), getattr(attn, f"norm_{name}")
                self.sequence.publish(name, x, (norm.weight, norm.eps), rotary_emb)
        out = self.sequence.attend().flatten(2).type_as(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out


class Cross:
    """The processor of every cross-attention: WanAttnProcessor's steps, with the kernels of self-attention.

    Each rank has all tokens of the text. What torch chooses by itself is half as quick on an H100.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        rotary_emb: None,
    ) -> Tensor:
        """Cross-attention of [B, tokens, C] to the text, [B, text tokens, C]."""
        q, text = attn.norm_q(attn.to_q(hidden_states)), encoder_hidden_states
        parts = q, attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in parts)
        out = self._attend(q, k, v).flatten(2).type_as(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out

    @torch.compiler.disable  # the kernels' libraries are not for tracing
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._split.sequence.attend_whole(q, k, v)


class GeluProjection(torch.nn.Module):
    """diffusers' GELU, a linear layer and the tanh approximation of GELU, as one matrix product on a GPU.

    cuBLASLt applies bias and GELU to the sums before they are rounded and stored. On a CPU the operator is the exact
    GELU, another function.
    """

    def __init__(self, proj: torch.nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._addmm_activation(self.proj.bias, x.flatten(0, -2), self.proj.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def compile_blocks(transformer: Any) -> None:
    """For a GPU: what torch.compile makes of the blocks, and what it does not fuse by itself.

    GELU in halves, that is: how exactly cuBLASLt takes the tanh in float32 is not said.
    """
    for block in transformer.blocks:
        first = block.ffn.net[0]
        tanh = isinstance(first, GELU) and first.approximate == "tanh" and first.proj.bias is not None
        if tanh and first.proj.weight.dtype in (torch.float16, torch.bfloat16):
            block.ffn.net[0] = GeluProjection(first.proj)
        block.compile(dynamic=False)


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

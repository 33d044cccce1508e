"""The transformers that `families.py` times: their real numbers, what their pipelines give them, and tiny ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from hpcdit.models.base import Encoding
from hpcdit.models.family import packed

# Queries are so many times as long as untrained ones, and gates as far open as trained ones: with scores of spread 1
# each token would attend to thousands alike, and the output would hardly show whether attention is right.
SHARPNESS, GATES = 3.0, 0.5
Draw = Callable[..., Tensor]  # of a shape: normal numbers in the type that is computed in


@dataclass(frozen=True)
class Inputs:
    """One step. theirs, ours: what the transformer is called with, by diffusers' pipeline and by our adapter: once, or
    with the prompt and then with the negative prompt; or once with both, the negative one first.

    noise: [B, C, f, h, w] of the latents; tokens: of the sequence that ours attends; negative: as `Guidance` wants it.
    """

    theirs: list[dict[str, Any]]
    ours: list[dict[str, Any]]
    noise: Tensor
    tokens: int
    negative: Encoding | None = None


@dataclass(frozen=True)
class Model:
    """A transformer. family: the adapter's name; kind: diffusers' class; config: what it is made with, but for layers.

    unit: layers that are repeated, by their keys in the configuration; units: of the whole model; timed: units that
    are made. sizes: (frames, height, width), the first the usual one. attention: who chooses its kernel in diffusers:
    "diffusers" itself, by a backend; "torch", of which cuDNN's may be asked for; "masked": torch, of those for masks.
    """

    family: str
    kind: str
    config: Mapping[str, Any]
    unit: Mapping[str, int]
    units: int
    timed: int
    sizes: tuple[tuple[int, int, int], ...]
    inputs: Callable[["Model", tuple[int, int, int], Draw], Inputs]
    attention: str = "diffusers"

    def build(self, units: int, device: torch.device, dtype: torch.dtype) -> Any:
        """So many units, made on the device: the same weights on every rank and in every variant."""
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with device:
                layers = {key: count * units for key, count in self.unit.items()}
                made: Any = getattr(diffusers, self.kind)(**self.config, **layers)
        finally:
            torch.set_default_dtype(torch.float32)
        made.requires_grad_(False).eval()
        kept = set(made._keep_in_fp32_modules or ())  # as from_pretrained has it
        for name, parameter in made.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter.fill_(SHARPNESS)
            elif name.endswith((".linear.bias", "_mod.1.bias")):
                parameter.normal_(0, GATES)
            if set(name.split(".")) & kept:
                parameter.data = parameter.data.float()
        return made

    def keep(self, made: Any, units: int, lists: list[str]) -> None:
        """Leaves so many units of a model; lists: the names of its lists of layers, in the order of `unit`."""
        for name, count in zip(lists, self.unit.values(), strict=True):
            setattr(made, name, nn.ModuleList(made.get_submodule(name)[: count * units]))

    def small(self) -> "Model":
        """One that a CPU computes in no time."""
        tiny = {key: n for key, n in TINY.items() if key in self.config} | TINY_OF.get(self.family, {})
        size = (1, 128, 128) if self.sizes[0][0] == 1 else (9, 64, 96)
        return replace(self, config={**self.config, **tiny}, units=4, timed=2, sizes=(size,))


def wan(model: Model, size: tuple[int, int, int], draw: Draw) -> Inputs:
    noise = draw(1, 16, *_latents(size))
    texts = [draw(1, _text(model, 512), model.config["text_dim"]) for _ in range(2)]
    timestep = torch.tensor([500], device=noise.device)
    calls = [dict(hidden_states=noise, timestep=timestep, encoder_hidden_states=text) for text in texts]
    return Inputs(calls, calls, noise, noise[0, 0].numel() // 4, {"prompt_embeds": texts[1]})


def cogvideox(model: Model, size: tuple[int, int, int], draw: Draw) -> Inputs:
    frames, height, width = _latents(size)
    config, (rows, columns) = model.config, (height // 2, width // 2)
    noise, text = draw(1, 16, frames, height, width), config["max_text_seq_length"]
    base = config["sample_width"] // 2, config["sample_height"] // 2
    rotary = get_3d_rotary_pos_embed(
        embed_dim=config["attention_head_dim"],
        crops_coords=get_resize_crop_region_for_grid((rows, columns), *base),
        grid_size=(rows, columns),
        temporal_size=frames,
        device=noise.device,
    )
    both = draw(2, text, config["text_embed_dim"])  # the negative prompt first
    call = dict(
        hidden_states=noise.transpose(1, 2).repeat(2, 1, 1, 1, 1),
        encoder_hidden_states=both,
        timestep=torch.tensor([500, 500], device=noise.device),
        image_rotary_emb=rotary,
    )
    return Inputs([call], [call], noise, frames * rows * columns + text, {"prompt_embeds": both[:1]})


def flux(model: Model, size: tuple[int, int, int], draw: Draw) -> Inputs:
    noise, text = _image(size, draw), _text(model, 512)
    _, _, _, height, width = noise.shape
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(noise)
    call = dict(
        hidden_states=packed(noise, (1, 2, 2)),
        encoder_hidden_states=draw(1, text, model.config["joint_attention_dim"]),
        pooled_projections=draw(1, model.config["pooled_projection_dim"]),
        timestep=torch.tensor([0.5], device=noise.device, dtype=noise.dtype),
        img_ids=places,
        txt_ids=places.new_zeros(text, 3),
        guidance=torch.tensor([3.5], device=noise.device),
    )
    return Inputs([call], [call], noise, len(places) + text)


def qwenimage(model: Model, size: tuple[int, int, int], draw: Draw) -> Inputs:
    """diffusers' pipeline gives as many tokens as the text has; our adapter as many as it may have, and a mask."""
    noise, most = _image(size, draw), _text(model, 512)
    tokens = packed(noise, (1, 2, 2))
    theirs, ours, encodings = list[dict[str, Any]](), list[dict[str, Any]](), list[Encoding]()
    for length in (most // 4, most // 32 * 2):  # of the prompt, and of the negative one
        text = draw(1, most, model.config["joint_attention_dim"])
        mask = (torch.arange(most, device=noise.device) < length).long()[None]
        encodings.append({"prompt_embeds": text * mask[..., None], "prompt_embeds_mask": mask})
        call = dict(
            hidden_states=tokens,
            timestep=torch.tensor([0.5], device=noise.device, dtype=noise.dtype),
            img_shapes=[[(1, noise.shape[3] // 2, noise.shape[4] // 2)]],
        )
        theirs.append(call | dict(encoder_hidden_states=text[:, :length], encoder_hidden_states_mask=None))
        padded, _ = encodings[-1].values()
        ours.append(call | dict(encoder_hidden_states=padded, encoder_hidden_states_mask=mask))
    return Inputs(theirs, ours, noise, tokens.shape[1] + most, encodings[1])


def hunyuanvideo(model: Model, size: tuple[int, int, int], draw: Draw) -> Inputs:
    noise, text = draw(1, 16, *_latents(size)), _text(model, 256)
    mask = (torch.arange(text, device=noise.device) < text * 2 // 5).to(noise.dtype)[None]
    call = dict(
        hidden_states=noise,
        timestep=torch.tensor([500.0], device=noise.device),
        encoder_hidden_states=draw(1, text, model.config["text_embed_dim"]),
        encoder_attention_mask=mask,
        pooled_projections=draw(1, model.config["pooled_projection_dim"]),
        guidance=torch.tensor([6000.0], device=noise.device, dtype=noise.dtype),
    )
    return Inputs([call], [call], noise, noise[0, 0].numel() // 4 + text)


def _latents(size: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = size
    return (frames - 1) // 4 + 1, height // 8, width // 8


def _image(size: tuple[int, int, int], draw: Draw) -> Tensor:
    return draw(1, 16, 1, size[1] // 8, size[2] // 8)


def _text(model: Model, tokens: int) -> int:
    """Tokens of the text: as many as the pipeline gives, or some of a tiny model."""
    return 32 if model.config["num_attention_heads"] == TINY["num_attention_heads"] else tokens


HEADS_128 = {"num_attention_heads": 24, "attention_head_dim": 128}
ROPE = {"axes_dims_rope": (16, 56, 56)}
MODELS = {
    "wan2.1-14b": Model(
        "wan",
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256},
        {"num_layers": 1},
        40,
        4,
        ((81, 480, 832), (81, 720, 1280)),
        wan,
    ),
    "cogvideox-5b": Model(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "text_embed_dim": 4096,
            "time_embed_dim": 512,
            "max_text_seq_length": 226,
            "sample_width": 90,
            "sample_height": 60,
            "use_rotary_positional_embeddings": True,
        },
        {"num_layers": 1},
        42,
        4,
        ((49, 480, 720),),
        cogvideox,
        attention="torch",
    ),
    "flux-dev": Model(
        "flux",
        "FluxTransformer2DModel",
        {**HEADS_128, **ROPE, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
        {"num_layers": 1, "num_single_layers": 2},
        19,
        2,
        ((1, 1024, 1024), (1, 2048, 2048)),
        flux,
    ),
    "qwen-image": Model(
        "qwenimage",
        "QwenImageTransformer2DModel",
        {**HEADS_128, **ROPE, "joint_attention_dim": 3584},
        {"num_layers": 1},
        60,
        4,
        ((1, 1024, 1024), (1, 2048, 2048)),
        qwenimage,
    ),
    "hunyuanvideo": Model(
        "hunyuanvideo",
        "HunyuanVideoTransformer3DModel",
        {**HEADS_128, "rope_axes_dim": (16, 56, 56), "text_embed_dim": 4096, "pooled_projection_dim": 768},
        {"num_layers": 1, "num_single_layers": 2},
        20,
        2,
        ((129, 720, 1280), (129, 544, 960)),
        hunyuanvideo,
        attention="masked",
    ),
}
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "ffn_dim": 96,
    "text_dim": 24,
    "freq_dim": 32,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "max_text_seq_length": 22,
    "sample_width": 12,
    "sample_height": 8,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
    "rope_axes_dim": (4, 6, 6),
}
TINY_OF = {"hunyuanvideo": {"num_refiner_layers": 1}}

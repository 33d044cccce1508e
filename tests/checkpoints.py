"""Tiny checkpoint folders for tests: a random Wan pipeline that renders, and a bare one without torch."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hpcdit.errors import InputError
from hpcdit.models.loading import inspect

MODEL_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
WORDS = (
    *(
        "a",
        "the",
        "of",
        "on",
        "in",
        "and",
        "red",
        "green",
        "blue",
        "yellow",
        "black",
        "white",
        "large",
        "slow",
    ),
    *("circle", "square", "star", "cat", "dog", "car", "moving", "left", "right", "up", "down", "sky", "sea"),
)


def make_wan(
    folder: Path,
    *,
    heads: int = 5,
    head_dim: int = 14,
    layers: int = 2,
    ffn_dim: int = 44,
    patch: tuple[int, int, int] = (1, 2, 2),
    rope_rows: int = 64,
    z_dim: int = 6,
    vae_dim: int = 6,
    text_dim: int = 12,
    words: Sequence[str] = WORDS,
    max_tokens: int = 40,
    scheduler: str = "FlowMatchEulerDiscreteScheduler",
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    seed: int = 0,
    experts: int = 1,
    fine: bool = False,
    image: str = "",
) -> Path:
    """Writes a random WanPipeline folder by diffusers' own classes; the same seed, the same bytes.

    The sizes divide nothing; a latent is 4 frames by 8 by 8 pixels. The weights are scaled so that every part
    matters: attention is peaked, gates are open, frames use the whole range of levels.
    experts: 2 as in Wan 2.2 A14B; fine: a VAE of patches, and a timestep a token, as in Wan 2.2 5B.
    image: encoded or latents: the model starts from a picture, as in Wan 2.1 and 2.2.
    scheduler: a class name of diffusers. max_shard_size: a small one ("50KB") gives sharded weights.
    """
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        transformer, *others = [
            WanTransformer3DModel(
                patch_size=patch,
                num_attention_heads=heads,
                attention_head_dim=head_dim,
                in_channels=2 * z_dim + 4 if image and not fine else z_dim,
                image_dim=12 if image == "encoded" else None,
                added_kv_proj_dim=heads * head_dim if image == "encoded" else None,
                out_channels=z_dim,
                text_dim=text_dim,
                freq_dim=32,
                ffn_dim=ffn_dim,
                num_layers=layers,
                rope_max_seq_len=rope_rows,
            )
            for _ in range(experts)
        ]
        vae: Any = AutoencoderKLWan(
            base_dim=vae_dim,
            z_dim=z_dim,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            **({"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16} if fine else {}),
            latents_mean=[0.1 * i - 0.2 for i in range(z_dim)],
            latents_std=[1.0 + 0.1 * i for i in range(z_dim)],
        )
        tokenizer = made_of(words, max_tokens)
        text_encoder: Any = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=text_dim,
                d_kv=4,
                d_ff=20,
                num_layers=1,
                num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        )
        for each in (transformer, *others):
            _stir(each)
        _stretch(vae)
        if dtype != "float32":
            for part in (transformer, *others, vae, text_encoder):
                part.to(getattr(torch, dtype))
        ratio = {"transformer_2": others[0], "boundary_ratio": 0.8} if others else {}
        made = _scheduler(scheduler)
        pipe: Any
        if image:
            pipe = _from_image(image, tokenizer, text_encoder, vae, made, transformer, expand_timesteps=fine, **ratio)
        else:
            pipe = WanPipeline(tokenizer, text_encoder, vae, made, transformer, expand_timesteps=fine, **ratio)
        pipe.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def _from_image(
    image: str, tokenizer: Any, text_encoder: Any, vae: Any, scheduler: Any, *more: Any, **rest: Any
) -> Any:
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts: tuple[Any, Any] = (None, None)
    if image == "encoded":
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **sizes))
        parts = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8), vision
    return WanImageToVideoPipeline(tokenizer, text_encoder, vae, scheduler, *parts, *more, **rest)


def write_picture(path: Path, size: tuple[int, int] = (70, 50)) -> Path:
    """Writes a PNG of colours that run into each other."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[: size[1], : size[0]]
    Image.fromarray(np.stack([rows * 5, columns * 3, (rows * columns) // 16], 2).astype(np.uint8)).save(path)
    return path


def _stir(transformer: Any) -> None:
    """Makes a fresh transformer's attention peaked and its gates wide: a wrong token shows in the frames."""
    import torch

    for name, weight in transformer.named_parameters():
        if "scale_shift_table" in name:
            weight.copy_(torch.randn_like(weight))
        elif "norm_q" in name or "norm_k" in name:
            weight.copy_(1.0 + torch.rand_like(weight))
        elif "to_v" in name or "to_out" in name or name.startswith("proj_out"):
            weight.mul_(2.0)


def stretch(vae: Any, latents: Any) -> None:
    """Makes a fresh VAE's picture come from the latents, which are typical, not from biases, and use all levels."""
    import torch

    for name, weight in vae.decoder.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
    seen: list[torch.Tensor] = []
    last = getattr(vae.decoder, "conv_out", None) or vae.decoder.proj_out
    hook = last.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    vae.decode(latents)
    hook.remove()
    for weight in last.parameters():
        weight.mul_(0.35 / torch.stack([part.std() for part in seen]).mean())


def _stretch(vae: Any) -> None:
    import torch

    latents = torch.randn(1, vae.config.z_dim, 2, 4, 6)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    stretch(vae, latents * std + mean)


def _scheduler(name: str) -> Any:
    import diffusers

    if name == "FlowMatchEulerDiscreteScheduler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def made_of(known: Sequence[str], max_tokens: int) -> Any:
    """One token a word, as the demo model's: unknown words are all alike, an end mark closes each prompt."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *known])}
    words_only = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words_only.normalizer = normalizers.Lowercase()
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    words_only.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        model_max_length=max_tokens,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )


def write_wan(folder: Path) -> Path:
    """Writes what a folder check sees of a Wan checkpoint, all weights zero, most of them left out."""
    components = {
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "T5TokenizerFast"),
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    }
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", **components})
    write_json(
        folder / "transformer" / "config.json",
        {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": 5,
            "attention_head_dim": 14,
            "num_layers": 3,
            "text_dim": 12,
            "rope_max_seq_len": 30,
        },
    )
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKLWan"})
    write_json(folder / "text_encoder" / "config.json", {"model_type": "umt5", "d_model": 12})
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    write_json(folder / "tokenizer" / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "scheduler" / "scheduler_config.json", {"flow_shift": 3.0})
    layers: dict[str, Sequence[int]] = {f"blocks.{i}.attn1.to_q.weight": (70, 70) for i in range(3)}
    write_zeros(
        folder / MODEL_WEIGHTS,
        {"patch_embedding.weight": (70, 16, 1, 2, 2), **layers},
    )
    write_zeros(folder / "vae" / "diffusion_pytorch_model.safetensors", {"post_quant_conv.weight": (16, 16, 1, 1, 1)})
    write_zeros(folder / "text_encoder" / "model.safetensors", {"shared.weight": (50, 12)})
    return folder


def refusal(folder: Path) -> str:
    """The one line that a checkpoint is refused with, with file names relative to `folder`."""
    with pytest.raises(InputError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert message.isprintable(), "one line without control characters"
    return message.replace(f"{folder}/", "")


def edit(path: Path, **values: Any) -> None:
    """Changes values in a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **values})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def write_zeros(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes a safetensors file of half-precision zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))

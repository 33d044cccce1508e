"""The transformers of Wan 2.1 with random weights, of which step.py times a step."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel

TEXT_DIM, CHANNELS = 4096, 16
# Queries are so many times as long as untrained ones. With scores of spread 1 each token would attend to thousands
# alike, and the output would hardly show whether attention is right.
SHARPNESS = 3.0


@dataclass(frozen=True)
class Model:
    """A size of Wan 2.1. timed: layers that are made where --layers says nothing."""

    heads: int
    ffn_dim: int
    layers: int
    timed: int


MODELS = {"14b": Model(40, 13824, 40, 4), "1.3b": Model(12, 8960, 30, 6)}


def transformer(
    model: Model, layers: int, device: torch.device, all_bf16: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """So many layers of a model, made on the device: the same weights on every rank and in every variant."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            made: Any = WanTransformer3DModel(
                num_attention_heads=model.heads,
                attention_head_dim=128,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                text_dim=TEXT_DIM,
                freq_dim=256,
                ffn_dim=model.ffn_dim,
                num_layers=layers,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    made.requires_grad_(False).eval()
    for block in made.blocks:
        block.attn1.norm_q.weight.fill_(SHARPNESS)
    if all_bf16:
        made.rope.to(torch.bfloat16)
    else:  # as from_pretrained has it
        for name, parameter in made.named_parameters():
            if set(name.split(".")) & set(made._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
    return made

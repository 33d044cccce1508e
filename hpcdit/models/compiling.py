"""For a GPU: what torch.compile makes of a transformer's layers, and what it does not fuse by itself."""

from collections.abc import Iterable

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn


class GeluProjection(nn.Module):
    """diffusers' GELU, a linear layer and the tanh approximation of GELU, as one matrix product on a GPU.

    cuBLASLt applies bias and GELU to the sums before they are rounded and stored. On a CPU the operator is the exact
    GELU, another function.
    """

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._addmm_activation(self.proj.bias, x.flatten(0, -2), self.proj.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Has each layer compiled when it is first called; diffusers' compile_repeated_blocks knows those of some classes.

    GELU in halves is fused, that is: how exactly cuBLASLt takes the tanh in float32 is not said.
    """
    for layer in layers:
        for parent in [*layer.modules()]:
            for name, child in [*parent.named_children()]:
                if isinstance(child, GELU) and _fits(child):
                    setattr(parent, name, GeluProjection(child.proj))
        layer.compile(dynamic=False)


def _fits(gelu: GELU) -> bool:
    half = gelu.proj.weight.dtype in (torch.float16, torch.bfloat16)
    return gelu.approximate == "tanh" and gelu.proj.bias is not None and half

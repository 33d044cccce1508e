"""Convolutions over time on CPUs by oneDNN: on one thread twice as fast as what torch takes for small frames."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.conv3d, up to rounding; x: [B, C, frames, rows, columns].

    On one thread torch takes a kernel of its own for one video of small frames (ConvParams::use_mkldnn in
    Convolution.cpp).
    """
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 5 and not isinstance(padding, str)
    if not ours or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    each = ([n] * 3 if isinstance(n, int) else list(n) * (3 // len(n)) for n in (padding, stride, dilation))
    return torch.ops.aten.mkldnn_convolution(x.contiguous(), weight, bias, *each, groups)


class Convolutions(TorchFunctionMode):
    """While it is entered, torch.conv3d of this thread is the one above."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (conv3d if func is torch.conv3d else func)(*args, **(kwargs or {}))

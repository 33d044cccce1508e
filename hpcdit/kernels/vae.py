"""What a VAE decodes with on CPUs where torch's own way is slow: convolutions over time, norms over channels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
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

    By oneDNN: on one thread torch takes a kernel of its own, half as fast, for one video of small frames
    (ConvParams::use_mkldnn in Convolution.cpp).
    """
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 5 and not isinstance(padding, str)
    if not ours or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    each = ([n] * 3 if isinstance(n, int) else list(n) * (3 // len(n)) for n in (padding, stride, dilation))
    return torch.ops.aten.mkldnn_convolution(x.contiguous(), weight, bias, *each, groups)


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """As F.normalize, up to rounding; x: [B, C, ...].

    The norm that torch computes over channels takes each number by itself (a strided reduction, which is not
    vectorized), a sum of squares whole vectors of columns: it takes a quarter of the time, or less.
    """
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and p == 2.0 and dim == 1 and x.dim() > 2
    if not ours or out is not None:
        return F.normalize(x, p, dim, eps, out)
    return x / (x * x).sum(1, keepdim=True).sqrt_().clamp_min_(eps)


class FastOnCpus(TorchFunctionMode):
    """While it is entered, this thread's torch functions of these names are those above."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return INSTEAD.get(func, func)(*args, **(kwargs or {}))


INSTEAD: dict[Any, Callable[..., Tensor]] = {torch.conv3d: conv3d, F.normalize: normalize}

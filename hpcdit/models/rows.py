"""A VAE computed by several ranks that hold some rows of each frame, as exactly as by one.

diffusers' own code runs unchanged on the rows of a rank. Only what looks beyond them is done together: where torch
would pad the rows, a neighbour's rows are put instead; group norms take their moments from all ranks; attention sees
all ranks' keys and values. Rows are cut in the latents, so that the cut lies between whole rows on every level. The
idea of a convolution that fetches its halo is that of spatial parallelism, Dryden et al., arXiv 1903.06681.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..kernels.vae import conv3d, normalize

# Of other classes nobody has looked whether there is more that looks beyond a row.
CLASSES = (
    "AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15",
    "AutoencoderKLLTXVideo", "AutoencoderKLMochi",
)  # fmt: skip


class Rows(Protocol):
    """The ranks that hold the rows of one video, in their order. All of them make the same calls."""

    @property
    def mine(self) -> range:
        """This rank's rows of the latents, at least one."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Each rank's number of rows of the latents."""

    def halos(self, x: Tensor, above: int, below: int) -> tuple[Tensor | None, Tensor | None]:
        """The last `above` rows of the rank above and the first `below` of the one below; None at the border.

        x: [..., rows, columns], as large on every rank but for the rows.
        """

    def gather(self, x: Tensor, dim: int, sizes: tuple[int, ...]) -> list[Tensor]:
        """Every rank's `x`, which has sizes[rank] entries along `dim`."""


def cuttable(vae: Any) -> bool:
    """Whether rows of this VAE's frames may be computed apart: not where it works in tiles, which overlap."""
    return type(vae).__name__ in CLASSES and not getattr(vae, "use_tiling", False)


class ByRows(TorchFunctionMode):
    """While it is entered, this thread's torch functions treat the rows that they get as part of a frame.

    Raises ValueError where a halo would be taller than what the neighbour has.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._rows = rows
        self._instead: dict[Any, Callable[..., Tensor]] = {
            F.pad: self._pad,
            torch.conv2d: self._conv(torch.conv2d),
            torch.conv3d: self._conv(conv3d),
            F.group_norm: self._group_norm,
            F.normalize: normalize,
            F.scaled_dot_product_attention: self._attention,
            torch.randn: self._randn,
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))

    def _pad(self, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
        """pad: before and after the columns, the rows, ..."""
        above, below = (*pad, 0, 0)[2:4]
        padded = F.pad(x, pad, mode, value)
        if above < 0 or below < 0 or above + below == 0:
            return padded
        if max(above, below) > x.shape[-2] // len(self._rows.mine) * min(self._rows.counts):
            raise ValueError(f"a halo of {max(above, below)} rows is taller than the rows of a rank")
        sides = (*pad[:2], 0, 0, *pad[4:])
        top, bottom = self._rows.halos(x, above, below)
        if top is not None and above:
            padded[..., :above, :] = F.pad(top, sides, mode, value)
        if bottom is not None and below:
            padded[..., -below:, :] = F.pad(bottom, sides, mode, value)
        return padded

    def _conv(self, conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def convolve(
            x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, *rest: Any
        ) -> Tensor:
            dims = weight.dim() - 2
            around = list(padding) if isinstance(padding, tuple | list) else [padding] * dims
            rows, around[-2] = around[-2], 0
            return conv(self._pad(x, (0, 0, rows, rows)), weight, bias, stride, around, *rest)

        return convolve

    def _group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        """x: [B, C, ...]. Moments of parts are put together as in Chan, Golub, LeVeque 1979."""
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide.reshape(*x.shape[:1], num_groups, -1), -1, correction=0)
        counts = self._rows.counts
        found = self._rows.gather(torch.stack([mean, var]).double()[None], 0, (1,) * len(counts))
        parts = torch.cat(found)  # [ranks, 2, B, groups]
        share = torch.tensor(counts, dtype=torch.float64, device=x.device).view(-1, 1, 1) / sum(counts)
        total = (share * parts[:, 0]).sum(0)
        spread = (share * (parts[:, 1] + (parts[:, 0] - total) ** 2)).sum(0)
        dims = (*x.shape[:2], *(1 for _ in x.shape[2:]))
        each = x.shape[1] // num_groups
        scale = (spread + eps).rsqrt().repeat_interleave(each, 1)
        shift = -total.repeat_interleave(each, 1) * scale
        if weight is not None:
            scale, shift = scale * weight.double(), shift * weight.double()
        if bias is not None:
            shift = shift + bias.double()
        return torch.addcmul(shift.to(wide).view(dims), wide, scale.to(wide).view(dims)).to(x.dtype)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        """q, k, v: [B, heads, tokens, D], the tokens of a frame's rows, or those of one frame after the other.

        Where it is causal by itself, tokens are the frames of one place, and all here.
        """
        if more.get("is_causal"):
            return F.scaled_dot_product_attention(q, k, v, attn_mask, **more)
        mine, counts = len(self._rows.mine), self._rows.counts
        sizes = tuple(k.shape[-2] // mine * count for count in counts)
        every = torch.cat(self._rows.gather(torch.cat([k, v], -1), k.dim() - 2, sizes), -2)
        keys, values = every.split([k.shape[-1], v.shape[-1]], -1)
        mask = None if attn_mask is None else _widened(attn_mask, mine, counts)
        return F.scaled_dot_product_attention(q, keys, values, mask, **more)

    def _randn(self, *size: Any, **more: Any) -> Tensor:
        """Noise of the whole frame, of which this rank takes its rows: the same video where all draw the same."""
        rows, columns = size[0] if len(size) == 1 else size
        mine, scale = self._rows.mine, rows // len(self._rows.mine)
        return torch.randn(scale * sum(self._rows.counts), columns, **more)[mine.start * scale : mine.stop * scale]


def _widened(mask: Tensor, mine: int, counts: tuple[int, ...]) -> Tensor:
    """A mask by which each frame sees itself and those before, for keys of all ranks, [..., queries, keys].

    mask: added to the scores of this rank's tokens, whose frames have `mine` rows.
    """
    first = int((mask.reshape(-1, mask.shape[-1])[0] == 0).sum())  # tokens of the first frame, all that it sees
    frames = mask[..., ::first]
    return torch.cat([frames.repeat_interleave(first // mine * count, -1) for count in counts], -1)

"""What runs on the device, for CPUs, in torch. The layout is `[tokens, batch, heads, dim]` throughout."""

import torch

from .base import AttendFirst, Blocks, Norm, Tables

LEAST_PART = 0  # numbers of a part of a matrix product that is worth a call of its own: it saves the part's copy


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all of q to all of k, v, with the log-sum-exp of its scores.

    q: [Lq, B, H, D]; k, v: [Lk, B, H, D]; any strides with unit stride in D; Lq, Lk, H may be zero.
    Returns out [Lq, B, H, D] in q's dtype and lse [Lq, B, H] in float32 (float64 for float64 inputs).
    """
    if q.numel() == 0 or k.numel() == 0:  # the kernel divides by its block count
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=lse_dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def attend_first(dtype: torch.dtype, dim: int) -> AttendFirst | None:
    """Attention to the first keys of each video, for heads of this dtype and dimension, where it need not ask the
    device how many they are: there is none here, and no need."""
    return None


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    new_out: torch.Tensor,
    new_lse: torch.Tensor,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two partial results over disjoint keys by their log-sum-exp, in float32 or better.

    Shapes as `attend` returns them; the merged out has the promoted dtype of lse, so that repeated merges lose nothing;
    with `into`, [tokens, B, H, D], it is written there instead, and rounded to its dtype.
    """
    top = torch.maximum(lse, new_lse)
    both = torch.logaddexp(lse, new_lse)
    # Where neither has met a key both are -inf: the weights are then 0, not nan.
    steady = torch.where(torch.isinf(top), torch.zeros_like(top), both)
    first, second = torch.exp(lse - steady)[..., None], torch.exp(new_lse - steady)[..., None]
    merged = out * first + new_out * second
    return merged if into is None else into.copy_(merged), both


def embed(x: torch.Tensor, norm: Norm | None, tables: Tables | None, blocks: Blocks) -> None:
    """Normalises and rotates x, each where asked for, and writes it into `blocks`.

    x: [B, tokens, H, D], numbers of a token side by side.
    """
    if norm is not None:
        weight, eps = norm
        x = torch.nn.functional.rms_norm(x.flatten(2), weight.shape, weight, eps).view(x.shape)
    if tables is not None:
        x = rotate(x, *tables)
    rows = x.transpose(0, 1)
    for heads, block in blocks:
        block.copy_(rows[:, :, heads.start : heads.stop])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by interleaved pairs. x: [B, tokens, H, D]; cos, sin: [tokens, 1, D/2].

    The same bits as diffusers' WanAttnProcessor, whose own is not to be had alone; diffusers' public function for it is
    three times slower on thousands of tokens.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1] to 0..255, rounded to nearest; same shape."""
    return (frames * 255).round().clamp(0, 255).to(torch.uint8)

"""What the executor asks of the device: one protocol, a module for each kind of device."""

from collections.abc import Sequence
from typing import Protocol

import torch

Norm = tuple[torch.Tensor, float]  # weight [H * D] of an RMS norm over all heads of a token, and its epsilon
Tables = tuple[torch.Tensor, torch.Tensor]  # of a rotary embedding: cos and sin, [tokens, 1, D / 2]
Blocks = Sequence[tuple[range, torch.Tensor]]  # heads, and where they go: [tokens, B, heads, D]


class Kernels(Protocol):
    """See `kernels.cpu` for the meaning of each."""

    LEAST_PART: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        new_out: torch.Tensor,
        new_lse: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def embed(self, x: torch.Tensor, norm: Norm | None, tables: Tables | None, blocks: Blocks) -> None: ...

    def to_uint8(self, frames: torch.Tensor) -> torch.Tensor: ...


def attend_counted(
    kernels: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.attend`, to those keys that count: [B, Lk], of type bool. One video after the other."""
    found = [
        kernels.attend(q[:, b : b + 1], k[counted, b : b + 1], v[counted, b : b + 1]) for b, counted in enumerate(keys)
    ]
    out, lse = zip(*found, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1)

"""Kernels that take as long as a device of a given speed would, without its work: a stand-in for GPUs.

Ranks that share cores steal time from each other, so that waiting for the network looks like overlap. These kernels
sleep instead; what they really compute is next to nothing, but enough to show a wrong transfer: out = q + the mean of
k + v over the keys. With lse = log(number of keys) partial results merge to q + the mean over all keys.
"""

import math
import time

import torch

from hpcdit.kernels import cpu


class PacedKernels:
    """What `hpcdit.kernels.base.Kernels` asks for. flops_per_s: of the device; infinite: calls take no time."""

    def __init__(self, flops_per_s: float = math.inf) -> None:
        self.flops_per_s = flops_per_s

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes and dtypes as `cpu.attend` has them."""
        end = time.perf_counter() + 4 * q.numel() * len(k) / self.flops_per_s
        if q.numel() == 0 or k.numel() == 0:
            return cpu.attend(q, k, v)
        # Sums of k and of v apart: their sum as a tensor would cost more than both.
        out = q + (k.sum(0) + v.sum(0)) / len(k)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], math.log(len(k)), dtype=lse_dtype)
        if (left := end - time.perf_counter()) > 0:
            time.sleep(left)
        return out, lse

    merge = staticmethod(cpu.merge)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a layer gives with these kernels. q: [B, tokens, H, D], some; k, v: [B, L, H, D], all."""
    return q + (k.double() + v.double()).mean(1, keepdim=True).to(q.dtype)

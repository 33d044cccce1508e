"""Kernels that take as long as a device of a given speed would, without its work: a stand-in for GPUs.

Ranks that share cores steal time from each other, so that waiting for the network looks like overlap. These kernels
sleep instead; what they really compute is next to nothing, but enough to show a wrong transfer: out = q + the mean of
k + v over the keys. With lse = log(number of keys) partial results merge to q + the mean over all keys.
"""

import math
import time

import torch

from hpcdit.kernels import cpu

WAITED_S = 3e-4  # between two calls: longer than the steps of a schedule that wait for nothing take
LATE_S = 3e-3


class PacedKernels:
    """What `hpcdit.kernels.base.Kernels` asks for. flops_per_s: of the device; infinite: calls take no time.

    A device is given its next call while it still works, and is not late for it. These kernels are late by as much as
    a sleep was too long and a merge took; the next call begins so much earlier, unless its caller had to wait for data
    meanwhile, or the debt is larger than a sleep can be too long.
    """

    def __init__(self, flops_per_s: float = math.inf) -> None:
        self.flops_per_s = flops_per_s
        self._free = 0.0  # when the device has done what it was given
        self._returned = 0.0

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes and dtypes as `cpu.attend` has them."""
        if q.numel() == 0 or k.numel() == 0:
            return cpu.attend(q, k, v)
        now = time.perf_counter()
        at_once = now - self._returned < WAITED_S and now - self._free < LATE_S
        self._free = (self._free if at_once else now) + 4 * q.numel() * len(k) / self.flops_per_s
        # Sums of k and of v apart: their sum as a tensor would cost more than both.
        out = q + (k.sum(0) + v.sum(0)) / len(k)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full(q.shape[:3], math.log(len(k)), dtype=lse_dtype)
        if (left := self._free - time.perf_counter()) > 0:
            time.sleep(left)
        self._returned = time.perf_counter()
        return out, lse

    LEAST_PART = cpu.LEAST_PART
    embed, to_uint8 = staticmethod(cpu.embed), staticmethod(cpu.to_uint8)
    attend_first = staticmethod(cpu.attend_first)

    def merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        new_out: torch.Tensor,
        new_lse: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `cpu.merge`."""
        merged = cpu.merge(out, lse, new_out, new_lse, into)
        self._returned = time.perf_counter()
        return merged


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a layer gives with these kernels. q: [B, tokens, H, D], some; k, v: [B, L, H, D], all."""
    return q + (k.double() + v.double()).mean(1, keepdim=True).to(q.dtype)

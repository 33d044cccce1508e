"""What the executor asks of the device: one protocol, a module for each kind of device."""

from typing import Protocol

import torch


class Kernels(Protocol):
    """See `kernels.cpu` for the meaning of each."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def merge(
        self, out: torch.Tensor, lse: torch.Tensor, new_out: torch.Tensor, new_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

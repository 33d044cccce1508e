"""Training on several GPUs of a host: every rank takes its share of each batch, and gradients are averaged.

What is drawn depends on the seed, the stage and the step alone, whatever the number of ranks: each draws all of it and
works on its rows. So one rank and several learn the same but for the order of sums.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that `torchrun` started, or this one alone. rank: of this one; size: how many."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def join(self, device: torch.device) -> None:
        """Finds the others. Every rank takes the GPU of its number."""
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @staticmethod
    def leave() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def rows(self, count: int) -> slice:
        """This rank's of `count` rows; none where there are more ranks than rows."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def average(self, weights: Sequence[Tensor]) -> None:
        """The mean of all ranks' gradients, in place. A weight that has none here may have none anywhere."""
        if self.size == 1:
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def share(self, value: Tensor, owner: int) -> Tensor:
        """A tensor of the owner's, which all have room for."""
        if self.size > 1:
            dist.broadcast(value, owner)
        return value

    def first(self, value: float, device: torch.device) -> float:
        """The first rank's number: clocks differ, and all have to decide alike."""
        return float(self.share(torch.tensor(value, dtype=torch.float64, device=device), 0))

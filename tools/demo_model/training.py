"""The state of a stage of training, and the file that it goes on from."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hpcdit.output import atomic

from .ranks import Ranks
from .settings import Stage


class Training:
    """Modules that are being trained: their weights, the running average of these, the optimizer, and steps done.

    modules: by the name that they have in the checkpoint. What `load` brings back is all that the next step needs.
    """

    def __init__(self, modules: dict[str, Any], stage: Stage, device: torch.device, ranks: Ranks) -> None:
        self.modules, self.stage, self.device, self._ranks = modules, stage, device, ranks
        self.steps, self.seconds = 0, 0.0
        self._weights = {
            f"{part}.{name}": weight for part, module in modules.items() for name, weight in module.named_parameters()
        }
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=stage.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
        )

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of a loss, which may be in the weights already."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate()
        if loss.requires_grad:
            loss.backward()
        weights = list(self._weights.values())
        self._ranks.average(weights)
        nn.utils.clip_grad_norm_(weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.stage.average, (1 + self.steps) / (10 + self.steps))
        now = [weight.detach() for weight in weights]
        torch._foreach_lerp_(list(self._average.values()), now, 1 - decay)

    def rate(self) -> float:
        """The learning rate of the next step: a short rise, then half a cosine down to lr_end."""
        stage, done = self.stage, self.steps / self.stage.steps
        rate = stage.lr_end + (stage.lr - stage.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
        return rate * min(1.0, (self.steps + 1) / stage.warmup)

    def average(self, part: str) -> dict[str, Tensor]:
        """The averaged weights of one of the modules, by their names in it."""
        return _part(self._average, part)

    def save(self, path: Path) -> None:
        """Writes everything, in place of an older file; whole, or not at all."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self._weights.items()}
        tensors |= {f"average/{name}": weight for name, weight in self._average.items()}
        for name, weight in self._weights.items():
            for key, value in self._optimizer.state[weight].items():
                tensors[f"optimizer.{key}/{name}"] = value
        tensors["steps"] = torch.tensor(self.steps)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        image = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"device": device})
        atomic.write(path, memoryview(image), replace=True)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Goes on from a file. Raises ValueError if it is another model's."""
        tensors = load_file(path, device=str(self.device))
        if {name for name in tensors if name.startswith("weight/")} != {f"weight/{name}" for name in self._weights}:
            raise ValueError(f"{path}: written for another model; allowed: an empty `out`, or the settings it was for")
        for name, weight in self._weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            self._average[name].copy_(tensors[f"average/{name}"])
            if f"optimizer.step/{name}" not in tensors:
                continue  # it never had a gradient: frozen, or a convolution over time in a stage of pictures
            state = {"step": tensors[f"optimizer.step/{name}"]}
            if self.device.type != "cuda":
                state["step"] = state["step"].cpu()
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.empty_like(weight).copy_(tensors[f"optimizer.{key}/{name}"])
            self._optimizer.state[weight] = state
        self.steps, self.seconds = int(tensors["steps"]), float(tensors["seconds"])


def steps_done(path: Path) -> int:
    """Steps that a checkpoint has behind it; 0 where there is none."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.get_tensor("steps"))


def cost(path: Path) -> tuple[int, float, str]:
    """Steps, seconds and the device of a checkpoint."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        return int(file.get_tensor("steps")), float(file.get_tensor("seconds")), metadata.get("device", "unknown")


def averaged(path: Path, part: str) -> dict[str, Tensor]:
    """A module's averaged weights out of a checkpoint."""
    prefix = f"average/{part}."
    with safe_open(path, "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}

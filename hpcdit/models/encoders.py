"""Text encoders that stay on the host, where a device has no room for them: they are needed once a prompt.

Each module that has weights of its own computes with a copy of them on the device, which is gone when it is done. (What
accelerate offers for that leaves parameters without values, by which diffusers' pipelines then misjudge their device.)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True, eq=False)
class Visit:
    """One module's. host: its own parameters, by name, which stay where they are."""

    host: dict[str, nn.Parameter]
    device: torch.device

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for name, parameter in self.host.items():
            setattr(module, name, nn.Parameter(parameter.data.to(self.device, copy=True), requires_grad=False))
        return self._here(args), self._here(kwargs)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in self.host.items():
            setattr(module, name, parameter)

    def _here(self, inputs: Any) -> Any:
        """What models make by themselves may be where their parameters are."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, inputs)


def leave_on_host(model: nn.Module, device: torch.device) -> None:
    """Has a model that lies on the host compute on `device`, by hooks; its buffers, which are small, move there."""
    for module in list(model.modules()):
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        own = dict(module.named_parameters(recurse=False))
        if own or module is model:
            visit = Visit(own, device)
            module.register_forward_pre_hook(visit.begin, with_kwargs=True)
            module.register_forward_hook(visit.end, always_call=True)

"""What is asked of a device that the host has to wait for: no CUDA graph can be made of it."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Asked(TorchDispatchMode):
    """Counts, while it is entered, how often the host waits for a number of the device's."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        self.count += op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return op(*given, **(options or {}))

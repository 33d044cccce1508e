"""FlashAttention 3 of the package fa3-fwd inside diffusers, which by itself finds it only under another name."""

from collections.abc import Callable
from typing import Any

import gpu
import torch
from diffusers.models import attention_dispatch
from torch import Tensor


@torch.library.custom_op("bench::fa3", mutates_args=())  # what torch.compile does not look into
def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gpu.fa3(q, k, v)[0]


@_fa3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def instead_of(backend: str) -> Callable[[], None]:
    """Lets diffusers call it where it would call `backend`, until what is returned is called."""
    backends: dict[Any, Any] = attention_dispatch._AttentionBackendRegistry._backends
    name = attention_dispatch.AttentionBackendName(backend)
    before = backends[name]

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return _fa3(query, key, value)

    backends[name] = attend

    def back() -> None:
        backends[name] = before

    return back

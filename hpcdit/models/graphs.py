"""Passes of a model as CUDA graphs: the host starts one thing a pass instead of thousands."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Captured:
    """One pass: what goes in, and what comes out, stays where it is."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]


class Replayed:
    """A model's `forward`: of inputs of one kind the first pass runs as it is, the second is captured, then replayed.

    The first pass compiles and tunes what there is to; so do all ranks, since their passes wait for each other's data.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        self._compute = compute
        self._seen = set[Hashable]()
        self._captured: dict[Hashable, Captured] = {}
        self._context: object = None

    def begin(self, context: object) -> None:
        """Passes from here on are of `context`, whose memory a graph holds on to: those of another are forgotten."""
        if context is not self._context:
            self._context = context
            self._seen.clear()
            self._captured.clear()

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in inputs.items() if name not in tensors}
        key = (*((n, x.shape, x.dtype) for n, x in tensors.items()), *sorted((n, repr(x)) for n, x in others.items()))
        if key not in self._seen:
            self._seen.add(key)
            return self._compute(**inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(tensors, others)
        found = self._captured[key]
        for name, x in tensors.items():
            found.inputs[name].copy_(x)
        found.graph.replay()
        return tuple(x.clone() for x in found.outputs)  # the next pass writes over them

    def _capture(self, tensors: dict[str, Tensor], others: dict[str, Any]) -> Captured:
        held = {name: x.clone() for name, x in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Relaxed: another thread may decode meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            outputs = self._compute(**held, **others)
        return Captured(graph, held, outputs)

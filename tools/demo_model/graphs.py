"""A step's passes, forward and back, as one CUDA graph: of a small model the host launches thousands of kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WARM = 3  # passes before one is captured: what is compiled and tuned at the first ones cannot be captured


@dataclass(frozen=True)
class Graph:
    """A captured pass: it reads `given`, and leaves `loss` and `gradients`, each always in the same place."""

    graph: Any
    given: tuple[Tensor, ...]
    loss: Tensor
    gradients: tuple[Tensor | None, ...]


class Graphs:
    """A graph for each size of clips. weights: those that get gradients; others are given none."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._graphs: dict[object, Graph] = {}
        self._pool: Any = None

    def loss(self, size: object, compute: Callable[..., Tensor], drawn: Sequence[Tensor]) -> Tensor:
        """What compute(*drawn) returns, a scalar, without history: its gradients are already in the weights.

        compute: a function of these tensors and the weights alone, always of the same shapes for one size.
        """
        if size not in self._graphs:
            self._graphs[size] = self._capture(compute, drawn)
        graph = self._graphs[size]
        for place, values in zip(graph.given, drawn, strict=True):
            place.copy_(values)
        graph.graph.replay()
        for weight, gradient in zip(self._weights, graph.gradients, strict=True):
            weight.grad = gradient
        return graph.loss.clone()

    def _capture(self, compute: Callable[..., Tensor], drawn: Sequence[Tensor]) -> Graph:
        given = tuple(values.clone() for values in drawn)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self._forget()
                compute(*given).backward()
        torch.cuda.current_stream().wait_stream(side)
        self._forget()
        self._pool = self._pool or torch.cuda.graph_pool_handle()  # one for all: only one of them runs at a time
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may ask the device for something meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = compute(*given)
            loss.backward()
        gradients = tuple(weight.grad for weight in self._weights)
        self._forget()
        return Graph(graph, given, loss.detach(), gradients)

    def _forget(self) -> None:
        for weight in self._weights:
            weight.grad = None

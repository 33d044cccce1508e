"""Passes of a model, on GPUs as CUDA graphs: the host starts one thing a pass instead of thousands."""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..spans import Spans, Tape
from ..transport.base import Traffic

if TYPE_CHECKING:
    from .base import Sequence


Name = tuple[str, int]  # of an input, and the place in it where it is a tuple; else -1


@dataclass
class Captured:
    """One pass: what goes in, and what comes out, stays where it is. moved: bytes that each replay moves."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[Name, Tensor]
    outputs: tuple[Tensor, ...]
    tape: Tape
    moved: Traffic


class Passes:
    """A model's `forward`. As graphs: of inputs of one kind the first pass runs as it is, later ones are replayed.

    The first pass compiles and tunes what there is to; so do all ranks, since their passes wait for each other's data.
    Of inputs of one kind there is one graph; more only where spans are recorded, as one pass's are not yet read while
    the next is launched.
    """

    def __init__(self, compute: Callable[..., tuple[Tensor, ...]], graph: bool = True) -> None:
        self._compute, self._graph = compute, graph
        self._seen = set[Hashable]()
        self._captured: dict[Hashable, list[Captured]] = {}
        self._sequence: Sequence | None = None
        self._spans, self._traffic = Spans(None, time.perf_counter), Traffic()

    def begin(self, sequence: "Sequence | None") -> None:
        """Passes from here on are of `sequence`, whose memory graphs hold on to: those of another are forgotten."""
        self._spans = sequence.spans if sequence else Spans(None, time.perf_counter)
        self._traffic = sequence.traffic if sequence else Traffic()
        if self._graph and sequence is not self._sequence:
            self._sequence = sequence
            self._seen.clear()
            self._captured.clear()

    def __call__(self, **inputs: Any) -> tuple[Tensor, ...]:
        if not self._graph:
            return self._as_it_is(inputs)
        tensors = dict(_tensors(inputs))
        others = {name: x for name, x in inputs.items() if name not in {name for name, _ in tensors}}
        key = (*((n, x.shape, x.dtype) for n, x in tensors.items()), *sorted((n, repr(x)) for n, x in others.items()))
        if key not in self._seen:
            self._seen.add(key)
            return self._as_it_is(inputs)
        there = self._captured.setdefault(key, [])
        found = next((each for each in there if not each.tape.unread), None)
        if found is None:
            found = self._capture(tensors, others)
            there.append(found)
        for name, x in tensors.items():
            found.inputs[name].copy_(x)
        with self._spans.launch(found.tape):
            found.graph.replay()
        self._traffic.add(found.moved)
        return tuple(x.clone() for x in found.outputs)  # the next pass writes over them

    def _as_it_is(self, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        with self._spans.launch():
            return self._compute(**inputs)

    def _capture(self, tensors: dict[Name, Tensor], others: dict[str, Any]) -> Captured:
        held = {name: x.clone() for name, x in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        # They are replayed one after the other, and outputs are copied at once: one memory is enough for all.
        pool = next((each.graph.pool() for there in self._captured.values() for each in there), None)
        torch.cuda.synchronize()
        before = self._traffic.take()
        try:
            # Relaxed: another thread may decode meanwhile.
            with self._spans.capture() as tape, torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
                outputs = self._compute(**_whole(held), **others)
        finally:
            moved = self._traffic.take()
            self._traffic.add(before)
        return Captured(graph, held, outputs, tape, moved)


def _tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[Name, Tensor]]:
    """Those among the inputs, and those in inputs that are tuples of them, as rotary tables are."""
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            yield (name, -1), x
        elif isinstance(x, tuple) and x and all(isinstance(part, Tensor) for part in x):
            yield from (((name, place), part) for place, part in enumerate(x))


def _whole(tensors: Mapping[Name, Tensor]) -> dict[str, Any]:
    """The inputs that `_tensors` found these in."""
    found = dict[str, Any]()
    for (name, place), x in tensors.items():
        found[name] = x if place < 0 else (*found.get(name, ()), x)
    return found

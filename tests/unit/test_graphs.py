"""What a replayed pass reads: the inputs of this call, also those in tuples. The GPU's graphs are played here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcdit.models.graphs import Passes


class Graph:
    """A replay does again what the capture did, with the same memory."""

    current: "Graph | None" = None
    made = 0

    def __init__(self) -> None:
        Graph.made += 1
        self.again: Callable[[], object] = lambda: None

    def replay(self) -> None:
        self.again()

    def pool(self) -> int:
        return 1


@contextmanager
def capture(graph: Graph, **_: Any) -> Iterator[None]:
    Graph.current = graph
    try:
        yield
    finally:
        Graph.current = None


def compute(x: Tensor, tables: tuple[Tensor, Tensor], scale: float, text: Tensor | None = None) -> tuple[Tensor, ...]:
    def whole() -> Tensor:
        return (x * tables[0] + tables[1]) * scale + (0 if text is None else text.sum())

    out = whole()
    if Graph.current:
        Graph.current.again = lambda: out.copy_(whole())
    return (out,)


def test_a_replay_reads_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    passes, made = Passes(compute), Graph.made
    for number in range(6):
        # So long that they are written alike: the ends of all are ones.
        tables = torch.ones(3000), torch.ones(3000)
        for table in tables:
            table[1000:2000] = number
        text = torch.ones(number // 3)
        inputs: dict[str, Any] = {"x": torch.full((3000,), number + 2.0), "tables": tables, "scale": 0.5, "text": text}
        (found,) = passes(**inputs)
        (wanted,) = compute(**inputs)
        assert torch.equal(found, wanted)
    assert Graph.made == made + 2  # a length of text each


def test_other_numbers_are_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    passes, x = Passes(compute), torch.ones(2)
    for scale in (0.5, 0.25, 0.5, 0.25):
        assert torch.equal(passes(x=x, tables=(x, x), scale=scale)[0], 2 * scale * x)

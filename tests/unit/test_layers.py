"""Layers that are brought when their turn comes compute what they computed where they were loaded."""

import os
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpcdit.errors import InputError
from hpcdit.models.layers import Layers
from hpcdit.transport.shelf import PAGE, HostShelf, places, room

WIDTH = 6


class Board:
    """A shelf of one process, on which each layer is some rank's; it brings a layer at once, or at the last moment."""

    def __init__(self, sizes: list[int], ranks: int, on_device: bool, late: bool, log: list[str]) -> None:
        self._layers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self._owners = [rank for rank, _ in places(sizes, ranks)]
        self.on_device, self._late, self._log, self.me = on_device, late, log, 0

    def mine(self, layer: int) -> Tensor | None:
        return self._layers[layer] if self._owners[layer] == self.me else None

    def fetch(self, layer: int, into: Tensor) -> Callable[[], None]:
        self._log.append(f"fetch {layer}")
        assert len(into) == len(self._layers[layer])
        if not self._late:
            into.copy_(self._layers[layer])

        def arrive() -> None:
            self._log.append(f"arrived {layer}")
            into.copy_(self._layers[layer])

        return arrive


class Block(nn.Module):
    """Sizes differ from block to block, and types within one."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH, dtype=torch.float64)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError
        return self.down(torch.sin(self.up(x)).double()).float()


def model(counts: list[int]) -> list[nn.Sequential]:
    return [nn.Sequential(*(Block(1 + (3 * i + k) % 7) for i in range(count))) for k, count in enumerate(counts)]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_passes_see_the_layers_that_are_theirs(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    ranks, on_device, late = data.draw(st.integers(1, 3)), data.draw(st.booleans()), data.draw(st.booleans())
    passes = data.draw(st.lists(st.tuples(st.sampled_from(range(len(counts))), st.booleans()), max_size=6))
    torch.manual_seed(sum(counts))
    transformers, x, log = model(counts), torch.randn(3, WIDTH), list[str]()
    with torch.no_grad():
        expected = [transformer(x) for transformer in transformers]
        others = [deepcopy(transformers) for _ in range(1, ranks)]
        layers = Layers([list(transformer) for transformer in transformers])
        board = Board(layers.sizes, ranks, on_device, late, log)
        for board.me in range(1, ranks):
            Layers([list(transformer) for transformer in others.pop()]).put(board)
        board.me = 0
        layers.put(board)
        layers.start(board, torch.device("cpu"))
        for which, fails in passes:
            last: Any = transformers[which][-1]
            last.fails = fails
            try:
                torch.testing.assert_close(transformers[which](x), expected[which], rtol=0, atol=0)
                assert not fails
            except ArithmeticError:
                assert fails
            last.fails = False


def test_the_next_layer_sets_out_before_a_layer_computes_and_none_is_kept() -> None:
    log = list[str]()
    (transformer,) = model([4])
    for number, block in enumerate(transformer):
        block.register_forward_hook(lambda *_, number=number: log.append(f"computed {number}"))
    loaded = [weakref.ref(parameter.data.untyped_storage()) for parameter in transformer.parameters()]
    layers = Layers([list(transformer)])
    board = Board(layers.sizes, ranks=1, on_device=False, late=True, log=log)
    layers.put(board)
    assert not any(values() for values in loaded), "what was loaded is still there"
    layers.start(board, torch.device("cpu"))
    for _ in range(2):
        transformer(torch.randn(1, WIDTH))
    turns = [f"arrived {i}, fetch {(i + 1) % 4}, computed {i}" for i in (0, 1, 2, 3) * 2]
    assert ", ".join(log) == ", ".join(["fetch 0", *turns])
    storages = {
        p.data.untyped_storage().data_ptr(): p.data.untyped_storage().nbytes() for p in transformer.parameters()
    }
    assert list(storages.values()) == [max(layers.sizes)] * 2


def test_what_a_rank_has_itself_is_used_where_it_lies() -> None:
    log = list[str]()
    (transformer,) = model([5])
    layers = Layers([list(transformer)])
    board = Board(layers.sizes, ranks=2, on_device=True, late=True, log=log)
    layers.put(board)
    layers.start(board, torch.device("cpu"))
    for _ in range(2):
        transformer(torch.randn(1, WIDTH))
    assert [said for said in log if "fetch" in said] == ["fetch 1", "fetch 3"]  # both stay, there is room for two


def test_a_host_without_room_for_shared_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf: Any = SimpleNamespace(_sizes=[1 << 30, 3 << 30], _cluster=SimpleNamespace(node_comm=SimpleNamespace(size=2)))
    for blocks, ranks, fits in ((1 << 20, 2, True), ((1 << 20) - 1, 2, False), (1 << 20, 3, False)):
        monkeypatch.setattr(os, "statvfs", lambda path, n=blocks: SimpleNamespace(f_bavail=n, f_frsize=4096))
        refused = pytest.raises(InputError, match=r"^model\.layers: .* GB; allowed: a larger /dev/shm")
        with nullcontext() if fits else refused:
            HostShelf._check_room(shelf, ranks)


@given(st.lists(st.integers(0, 3 * PAGE), max_size=20), st.integers(1, 5))
def test_places_do_not_overlap_and_are_shared_out_evenly(sizes: list[int], ranks: int) -> None:
    found = places(sizes, ranks)
    taken = sorted((rank, at, at + size) for (rank, at), size in zip(found, sizes, strict=True) if size)
    assert all(at % PAGE == 0 and end <= room(sizes, ranks) for _, at, end in taken)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(taken))
    counts = [sum(rank == r for rank, _ in found) for r in range(ranks)]
    assert max(counts) - min(counts) <= 1

"""What a workload takes of memory, against where the executor lays it."""

from dataclasses import replace

import pytest
import torch

from hpcdit.attention.methods import Layout
from hpcdit.attention.placement import Placement
from hpcdit.attention.schedule import Shape
from hpcdit.planner.workload import SETS, Workload
from hpcdit.render.plan import shelves


def test_of_layers_that_lie_elsewhere_two_count_and_the_own_ones() -> None:
    whole = Workload(100, 2, 8, layers=10, ffn_dim=64, itemsize=2, weights=5_000_000, float_weights=7)
    whole = replace(whole, layer_weights=4_000_000, largest_layer=500_000)
    assert whole.weights_bytes == 2 * 5_000_000 + 4 * 7
    assert replace(whole, shelves=0).weights_bytes == 2 * (1_000_000 + 2 * 500_000) + 4 * 7
    assert replace(whole, shelves=4).weights_bytes == 2 * (1_000_000 + 1_500_000 + 2 * 500_000) + 4 * 7
    assert replace(whole, layer_weights=900_000, shelves=2).weights_bytes == whole.weights_bytes  # hardly any layers


@pytest.mark.parametrize(
    ("layers", "cuda", "held"),
    [("resident", True, 1), ("sharded", True, 2), ("sharded", False, 2), ("host", True, 0), ("host", False, 2)],
)
def test_layers_are_held_by_the_ranks_of_the_smallest_node(layers: str, cuda: bool, held: int) -> None:
    assert shelves(layers, [0, 0, 0, 1, 1], cuda) == held


@pytest.mark.parametrize(
    "layout",
    [
        Layout("ulysses", 1, 1),
        Layout("ulysses", 4, 1),
        Layout("ring", 1, 4),
        Layout("usp", 2, 2),
        Layout("torus", 4, 1),
        Layout("torus", 4, 2, 1),
        Layout("torus", 2, 4, groups=2),
    ],
    ids=str,
)
def test_symmetric_memory_is_planned_as_it_is_laid_out(layout: Layout) -> None:
    ranks = layout.ulysses * layout.ring
    work = Workload(64 * ranks, 8, 64, layers=2, ffn_dim=64, itemsize=2)
    shape = Shape(1, work.tokens, work.heads, work.head_dim)
    pattern = Placement(layout.schedule(), shape, tuple(range(ranks))).pattern(torch.bfloat16)
    wanted = SETS * 2 * max(pattern.elements(rank) for rank in range(ranks))
    assert work.exchanged_bytes(layout.ulysses, layout.ring, stored=True) == wanted

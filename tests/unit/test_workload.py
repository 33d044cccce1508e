"""What a workload takes of memory, against where the executor lays it."""

import pytest
import torch

from hpcdit.attention.methods import Layout
from hpcdit.attention.placement import Placement
from hpcdit.attention.schedule import Shape
from hpcdit.planner.workload import SETS, Workload


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

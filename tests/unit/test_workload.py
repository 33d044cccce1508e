"""What a workload takes of memory, against where the executor lays it."""

from dataclasses import replace

import pytest
import torch

from hpcdit.attention.methods import Layout
from hpcdit.attention.placement import Placement
from hpcdit.attention.schedule import Shape
from hpcdit.errors import InputError
from hpcdit.planner.groups import Fixed
from hpcdit.planner.workload import SETS, Workload
from hpcdit.render.plan import plan_fitting, shelves
from tests.unit.test_planner import H100


def test_of_layers_that_lie_elsewhere_two_count_and_the_own_ones() -> None:
    whole = Workload(100, 2, 8, layers=10, ffn_dim=64, itemsize=2, weights=5_000_000, float_weights=7)
    whole = replace(whole, layer_weights=4_000_000, largest_layer=500_000)
    assert whole.weights_bytes == 2 * 5_000_000 + 4 * 7
    assert replace(whole, shelves=0).weights_bytes == 2 * (1_000_000 + 2 * 500_000) + 4 * 7
    assert replace(whole, shelves=4).weights_bytes == 2 * (1_000_000 + 1_500_000 + 2 * 500_000) + 4 * 7
    assert replace(whole, layer_weights=900_000, shelves=2).weights_bytes == whole.weights_bytes  # hardly any layers


def test_text_encoders_stay_on_the_host_where_nothing_fits_with_them() -> None:
    wan = Workload(32_760, 40, 128, 40, 13_824, 50, 1, True, 2, weights=14_300_000_000 + 5_700_000_000)
    wan = replace(wan, encoder_weights=5_700_000_000, float_weights=127_000_000)
    assert wan.weights_bytes - replace(wan, encoders_apart=True).weights_bytes == 2 * 5_700_000_000

    def fits(gigabytes: float, devices: bool = True) -> bool:
        """Whether they stay on the host."""
        plan, planned = plan_fitting(wan, [0, 0], replace(H100, memory_bytes=gigabytes * 1e9), Fixed(), devices)
        assert plan.memory_bytes <= gigabytes * 1e9 and plan.memory_bytes > planned.weights_bytes
        return planned.encoders_apart

    assert [fits(80), fits(40)] == [False, True]
    for memory, devices in ((24, True), (40, False)):  # a host has but one memory
        with pytest.raises(InputError, match=r"no layout fits"):
            fits(memory, devices)


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

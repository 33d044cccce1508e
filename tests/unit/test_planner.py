"""The planner ranks legal layouts, and refuses the others by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.attention.methods import METHODS
from hpcdit.attention.schedule import Shape, check
from hpcdit.errors import InputError
from hpcdit.planner.search import Plan, price, search, table

SHAPE = Shape(1, 1296, 12, 24)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 8), st.sampled_from(["auto", "torus", "usp", "ring"]))
def test_every_plan_is_a_legal_layout_of_all_ranks(ranks: int, per_node: int, heads: int, method: str) -> None:
    nodes = [rank // per_node for rank in range(ranks)]
    plans = search(Shape(1, 61, heads, 8), nodes, method)
    assert plans and plans == sorted(plans, key=Plan.rank_by)
    for plan in plans:
        assert plan.ulysses * plan.ring == ranks and plan.ulysses <= heads
        assert plan.method in METHODS and method in ("auto", plan.method)
        check(plan.schedule(), nodes)


def test_across_nodes_the_exchange_that_is_hidden_wins_and_inside_one_the_fewest_bytes() -> None:
    assert search(SHAPE, [0, 0, 1, 1, 2, 2])[0].method == "torus"
    assert search(SHAPE, [0, 0, 0, 0])[0].method == "ulysses"


def test_heads_that_do_not_divide_count_as_lost_time() -> None:
    """12 heads on 5 ranks: Ulysses leaves three to one rank and two to another, Ring shares evenly."""
    assert price("ulysses", 5, 1, SHAPE, [0] * 5).imbalance == pytest.approx(3 / 2.4, rel=0.01)
    assert search(SHAPE, [0] * 5)[0].method == "ring"


def test_degrees_that_are_given_are_kept() -> None:
    assert {(p.ulysses, p.ring) for p in search(SHAPE, [0] * 6, ulysses=3)} == {(3, 2)}
    assert {(p.ulysses, p.ring) for p in search(SHAPE, [0] * 6, "usp", ring=6)} == {(1, 6)}
    with pytest.raises(InputError, match="their product must be the 6 ranks"):
        search(SHAPE, [0] * 6, ulysses=4)
    with pytest.raises(InputError, match="the model has 12 heads"):
        search(SHAPE, [0] * 13, "ulysses")


def test_the_table_names_the_chosen_plan_first() -> None:
    plans = search(SHAPE, [0, 0, 1, 1])
    lines = table(plans, SHAPE, 4, 6).splitlines()
    assert lines[2].startswith("> ") and plans[0].method in lines[2]
    assert len(lines) == 2 + len(plans)

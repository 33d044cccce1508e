"""The simulator against sums done by hand, against itself with every rank simulated, and against laws."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.attention.methods import METHODS, Layout
from hpcdit.attention.schedule import Attend, Piece, Shape, traffic
from hpcdit.planner.costs import Costs, Link
from hpcdit.planner.flows import Flow, Network
from hpcdit.planner.simulate import simulate
from hpcdit.planner.symmetry import Symmetry

# Copies and the network inside a node cost nothing, so that the sums below are short.
FREE = Link(0.0, 1e30)
COSTS = Costs(
    1e9, 1e9, 0.0, lanes=1, tile=1, copy_bytes_per_s=1e30, memory_bytes=1e12, inter=Link(0.0, 1e6), intra=FREE
)


@st.composite
def problems(draw: st.DrawFn, even: bool) -> tuple[Layout, Shape, tuple[int, ...]]:
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks, method = nodes * per_node, draw(st.sampled_from(sorted(METHODS)))
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    ulysses = {"ulysses": ranks, "ring": 1}.get(method) or draw(st.sampled_from(divisors))
    layout = Layout(method, ulysses, ranks // ulysses, draw(st.integers(0, 2)), draw(st.integers(1, 3)))
    length = ranks * draw(st.integers(1, 20)) if even else draw(st.integers(1, 200))
    heads = ulysses * draw(st.integers(1, 4)) if even else draw(st.integers(ulysses, ulysses + 7))
    return layout, Shape(1, length, heads, 8), tuple(rank // per_node for rank in range(ranks))


def test_one_rank_takes_its_one_call() -> None:
    shape = Shape(2, 100, 3, 8)
    found = simulate(Layout("ulysses", 1, 1).schedule(), shape, (0,), COSTS, 4)
    assert found.seconds == pytest.approx(2 * 100 * 100 * 3 * 4 * 8 / 1e9)
    assert found.inter_bytes == found.intra_bytes == 0


@pytest.mark.parametrize("latency_s", [1e-4, 0.25])
def test_two_nodes_of_ulysses_pay_for_each_transfer_and_the_whole_computation(latency_s: float) -> None:
    shape = Shape(1, 100, 2, 8)
    costs = replace(COSTS, inter=Link(latency_s, 1e6))
    found = simulate(Layout("ulysses", 2, 1).schedule(), shape, (0, 1), costs, 4)
    piece_s = 50 * 1 * 8 * 4 / 1e6
    assert found.compute_s == pytest.approx(100 * 100 * 1 * 4 * 8 / 1e9)
    assert found.seconds == pytest.approx(3 * piece_s + latency_s + found.compute_s + piece_s + latency_s)


def test_what_is_put_inside_a_node_travels_while_ranks_compute() -> None:
    """A ring of two on one node: what is read in place is waited for, what is put is hidden behind the own half."""
    shape, schedule = Shape(1, 8000, 1, 8), Layout("ring", 1, 2).schedule()
    costs = replace(COSTS, intra=Link(0.0, 1e6))
    read, put = (simulate(schedule, shape, (0, 0), replace(costs, puts=puts), 4) for puts in (False, True))
    moving_s = 2 * 4000 * 8 * 4 / 1e6
    assert moving_s < read.compute_s / 2
    assert read.seconds == pytest.approx(read.compute_s + moving_s)
    assert put.seconds == pytest.approx(put.compute_s)
    assert (put.inter_bytes, put.intra_bytes) == (0, read.intra_bytes) and read.intra_bytes == 4 * 4000 * 8 * 4
    assert {span.lane for span in put.spans} == {"compute", "intra"}


def test_transfers_slow_the_computation_beside_them() -> None:
    """A ring of two: k and v travel while each attends its own; the second half is attended with nothing beside it."""
    shape = Shape(1, 8000, 1, 8)
    free, half = (
        simulate(Layout("ring", 1, 2).schedule(), shape, (0, 1), replace(COSTS, inter=Link(0.0, 1e6), overlap=o), 4)
        for o in (1.0, 0.5)
    )
    moving_s = 2 * 4000 * 8 * 4 / 1e6
    assert moving_s < free.compute_s / 2
    assert half.compute_s == free.compute_s
    assert half.seconds == pytest.approx(free.seconds + moving_s / 2)


def test_what_is_wanted_later_gives_way_on_the_link() -> None:
    network = Network((0, 1), replace(COSTS, inter=Link(0.0, 1e6)), 1)
    late, soon = (Flow((0, order), 0, Piece("k", 0, order), 1, Piece("k", 0, order), 1000) for order in (5, 2))
    for flow in (late, soon):
        network.add(flow, 0, 1)
    network.ready(0, late.piece, 0.0)
    assert network.under_way == [late]
    late.left = 400.0  # as the simulation counts it down
    network.ready(0, soon.piece, 0.0006)
    assert network.under_way == [soon]
    network.gone(soon, 0.0016)
    assert network.under_way == [late] and late.left == 400 and (soon.start, late.start) == (0.0006, 0.0)


def test_ranks_of_a_node_share_its_link() -> None:
    """Twice the ranks a node, each with half of the data: the same bytes on the same link, the same seconds."""
    costs = replace(COSTS, attention_flops=1e30)
    one, two = (
        simulate(Layout("tas", 2, m).schedule(), Shape(1, 120, 2, 8), (0,) * m + (1,) * m, costs, 4) for m in (1, 2)
    )
    assert one.inter_bytes == two.inter_bytes
    assert two.seconds == pytest.approx(one.seconds)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(even=True))
def test_ranks_that_are_left_out_would_have_done_the_same(problem: tuple[Layout, Shape, tuple[int, ...]]) -> None:
    layout, shape, nodes = problem
    schedule = layout.schedule()
    few = simulate(schedule, shape, nodes, COSTS, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Symmetry, "_period", lambda self, schedule, nodes: schedule.mesh.size)
        every = simulate(schedule, shape, nodes, COSTS, 4)
    assert few.seconds == pytest.approx(every.seconds)
    assert (few.inter_bytes, few.intra_bytes) == (every.inter_bytes, every.intra_bytes)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(even=False))
def test_bytes_are_the_schedule_s_and_no_bound_is_beaten(problem: tuple[Layout, Shape, tuple[int, ...]]) -> None:
    layout, shape, nodes = problem
    schedule = layout.schedule()
    found, moved = simulate(schedule, shape, nodes, COSTS, 4), traffic(schedule, shape, nodes)
    assert (found.inter_bytes, found.intra_bytes) == (4 * moved["inter"], 4 * moved["intra"])
    calls = sum(isinstance(step, Attend) for steps in schedule.ranks for step in steps)
    assert calls >= len(nodes) and found.seconds >= found.compute_s * (1 - 1e-9)
    sent = [4 * sum(_count(layout, shape, piece) for piece in out) for out in _leaving(layout, nodes)]
    assert found.seconds >= max(sent) / COSTS.inter.bytes_per_s * (1 - 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(even=True), st.floats(1, 10))
def test_a_device_without_waits_is_no_slower_with_no_network_at_all(
    problem: tuple[Layout, Shape, tuple[int, ...]], factor: float
) -> None:
    layout, shape, nodes = problem
    schedule = layout.schedule()
    slow = simulate(schedule, shape, nodes, COSTS, 4)
    free = simulate(schedule, shape, nodes, replace(COSTS, inter=FREE), 4)
    assert free.seconds <= slow.seconds * (1 + 1e-9)
    faster = replace(COSTS, attention_flops=factor * 1e9, inter=Link(0.0, factor * 1e6))
    assert simulate(schedule, shape, nodes, faster, 4).seconds == pytest.approx(slow.seconds / factor)


def _leaving(layout: Layout, nodes: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """For each node: (rank, head slot) of the pieces that leave it."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(nodes[-1] + 1)]
    for source, _, piece in layout.schedule().crossings(nodes):
        found[nodes[source]].append((piece.tokens, piece.heads))
    return found


def _count(layout: Layout, shape: Shape, piece: tuple[int, int]) -> int:
    tokens, slot = piece
    ranks = layout.ulysses * layout.ring
    rows = (tokens + 1) * shape.length // ranks - tokens * shape.length // ranks
    return rows * len(layout.schedule().heads(shape.heads)[slot]) * shape.dim

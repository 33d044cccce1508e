"""check() accepts every method on every mesh, and refuses a schedule that was tampered with."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.attention.check import ScheduleError, check
from hpcdit.attention.methods import METHODS, degrees, schedule
from hpcdit.attention.schedule import Attend, Piece, Pull, Push, Schedule, Step
from hpcdit.errors import InputError
from hpcdit.mesh import Mesh, cut


@st.composite
def layouts(draw: st.DrawFn, least: int = 1) -> tuple[Schedule, tuple[int, ...]]:
    """A method on up to 12 ranks with any degrees, and the nodes that its ranks lie on."""
    method, ranks = draw(st.sampled_from(sorted(METHODS))), draw(st.integers(least, 12))
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    ulysses = {"ulysses": ranks, "ring": 1}.get(method) or draw(st.sampled_from(divisors))
    per_node = draw(st.integers(1, ranks))
    whole = schedule(method, ulysses, ranks // ulysses, draw(st.integers(0, 3)), draw(st.integers(1, 3)))
    return whole, tuple(rank // per_node for rank in range(ranks))


def with_steps(whole: Schedule, rank: int, steps: list[Step]) -> Schedule:
    return replace(whole, ranks=tuple(tuple(steps) if r == rank else old for r, old in enumerate(whole.ranks)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts())
def test_every_method_passes_on_every_mesh(layout: tuple[Schedule, tuple[int, ...]]) -> None:
    check(*layout)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layouts(least=2), st.data())
def test_a_step_removed_is_noticed(layout: tuple[Schedule, tuple[int, ...]], data: st.DataObject) -> None:
    whole, nodes = layout
    rank = data.draw(st.integers(0, whole.mesh.size - 1))
    steps = list(whole.ranks[rank])
    steps.pop(data.draw(st.integers(0, len(steps) - 1)))
    with pytest.raises(ScheduleError):
        check(with_steps(whole, rank, steps), nodes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layouts(least=2), st.data())
def test_a_step_doubled_is_noticed(layout: tuple[Schedule, tuple[int, ...]], data: st.DataObject) -> None:
    whole, nodes = layout
    rank = data.draw(st.integers(0, whole.mesh.size - 1))
    steps = list(whole.ranks[rank])
    step = data.draw(st.sampled_from(steps))
    steps.insert(data.draw(st.integers(0, len(steps))), step)
    with pytest.raises(ScheduleError):
        check(with_steps(whole, rank, steps), nodes)


def uses(step: Step, piece: Piece) -> bool:
    """Whether `step` needs `piece` to have been pulled, or to be finished."""
    if isinstance(step, Attend):
        return piece.heads == step.heads and piece.tokens in (step.q if piece.tensor == "q" else step.kv)
    return False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layouts(least=2), st.data())
def test_a_step_used_before_it_is_made_is_noticed(
    layout: tuple[Schedule, tuple[int, ...]], data: st.DataObject
) -> None:
    """Moves a Pull behind the first Attend that needs it, or a Push before the last Attend that makes its piece."""
    whole, nodes = layout
    rank = data.draw(st.integers(0, whole.mesh.size - 1))
    steps = list(whole.ranks[rank])
    movable = []
    for at, step in enumerate(steps):
        if isinstance(step, Pull):
            movable += [(at, to) for to, later in enumerate(steps) if to > at and uses(later, step.piece)][:1]
        elif isinstance(step, Push):
            heads, before = step.piece.heads, enumerate(steps[:at])
            made = [to for to, s in before if isinstance(s, Attend) and step.home in s.q and s.heads == heads]
            movable += [(at, made[-1])]
    at, to = data.draw(st.sampled_from(movable))
    steps.insert(to, steps.pop(at))
    with pytest.raises(ScheduleError):
        check(with_steps(whole, rank, steps), nodes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts(least=2), st.data())
def test_a_step_of_another_rank_or_piece_is_noticed(
    layout: tuple[Schedule, tuple[int, ...]], data: st.DataObject
) -> None:
    whole, nodes = layout
    rank, size = data.draw(st.integers(0, whole.mesh.size - 1)), whole.mesh.size
    steps = list(whole.ranks[rank])
    at = data.draw(st.integers(0, len(steps) - 1))
    other = data.draw(st.integers(0, size - 1))
    match steps[at]:
        case Pull(piece, source):
            changed: Step = Pull(replace(piece, tokens=other), source)
        case Attend(q, kv, heads):
            slot = data.draw(st.integers(0, whole.slots - 1))
            wrong = [Attend((other, *q[1:]), kv, heads), Attend(q, (other, *kv[1:]), heads), Attend(q, kv, slot)]
            changed = data.draw(st.sampled_from(wrong))
        case Push(piece, home):
            changed = data.draw(st.sampled_from([Push(piece, other), Push(replace(piece, tokens=other), home)]))
    if changed == steps[at]:
        return
    steps[at] = changed
    with pytest.raises(ScheduleError):
        check(with_steps(whole, rank, steps), nodes)


def test_a_cycle_of_waits_is_noticed() -> None:
    """Two ranks that pull a third's keys from each other: each waits for the other to have them."""
    whole = schedule("ring", 1, 3)
    k, v = Piece("k", 2, 0), Piece("v", 2, 0)
    ranks = [list(steps) for steps in whole.ranks]
    for rank, other in ((0, 1), (1, 0)):
        own = [s for s in ranks[rank] if not (isinstance(s, Pull) and s.piece.tokens == 2)]
        ranks[rank] = [Pull(v, other), Pull(k, other), *own]
    broken = replace(whole, ranks=tuple(map(tuple, ranks)))
    with pytest.raises(ScheduleError, match="wait for each other"):
        check(broken)


def test_memory_that_is_reused_before_its_last_reader_is_noticed() -> None:
    """Rank 1 does rank 0's work too, so rank 0 hears from rank 1 alone, while rank 2 reads its keys as well."""

    def kv(*ranks: int) -> tuple[Step, ...]:
        return tuple(Pull(Piece(t, rank, 0), rank) for rank in ranks for t in "vk")

    all_three = (0, 1, 2)
    one: tuple[Step, ...] = (*kv(0, 2), Pull(Piece("q", 0, 0), 0), Attend((0, 1), all_three), Push(Piece("o", 0, 0), 0))
    two: tuple[Step, ...] = (*kv(0, 1), Attend((2,), all_three))
    with pytest.raises(ScheduleError, match="rank 0 may overwrite what rank 2 still reads"):
        check(Schedule("ring", Mesh(("ulysses", 1), ("ring", 3)), ((), one, two)))


@given(st.integers(0, 1000), st.integers(1, 50))
def test_a_cut_is_even_and_complete(n: int, parts: int) -> None:
    ranges = cut(n, parts)
    assert [i for r in ranges for i in r] == list(range(n))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_mesh_coordinates_name_each_rank_once(extents: list[int]) -> None:
    mesh = Mesh(*((f"axis{i}", extent) for i, extent in enumerate(extents)))
    assert [mesh.rank(**mesh.coords(rank)) for rank in range(mesh.size)] == list(range(mesh.size))


@pytest.mark.parametrize(
    "method, ranks, heads, given_degrees, words",
    [
        ("ulysses", 6, 5, {}, "has 5 heads; allowed: 1 to 5"),
        ("torus", 6, 12, {"ulysses": 4}, "their product must be the 6 ranks"),
        ("tas", 6, 12, {"ulysses": 4, "ring": 2}, "1x6, 2x3, 3x2, 6x1"),
        ("ring", 4, 12, {"ulysses": 2}, "method ring on 4 ranks is ulysses=1 ring=4"),
    ],
)
def test_impossible_degrees_are_refused_by_name(
    method: str, ranks: int, heads: int, given_degrees: dict[str, int], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        degrees(method, ranks, heads, **given_degrees)
    assert "parallel.ulysses=" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ranks, heads, expected", [(8, 24, (8, 1)), (6, 40, (2, 3)), (4, 5, (1, 4))])
def test_free_degrees_follow_the_papers_rule(ranks: int, heads: int, expected: tuple[int, int]) -> None:
    assert degrees("torus", ranks, heads) == expected

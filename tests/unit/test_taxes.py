"""Where a video's time went: told apart from its spans, to the last second."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.output.taxes import Rates, Times, measure
from hpcdit.output.trace import EVENT
from tests.unit.test_spans import MS, Device, Model

Span = tuple[str, int, str, float, float, int]
RATES = Rates(inter=(0.0, 100.0), intra=(0.0, 1000.0))


def events(*spans: Span) -> np.ndarray:
    return np.array([(name.encode(), rank, lane.encode(), a, b, size) for name, rank, lane, a, b, size in spans], EVENT)


STEP: tuple[Span, ...] = (
    ("step", 0, "compute", 0, 10, 0),
    ("pass", 0, "compute", 1, 9, 0),
    ("attend", 0, "compute", 2, 4, 0),
    ("attend", 0, "compute", 6, 7, 0),
)


def test_a_transfer_behind_attention_costs_nothing() -> None:
    times = measure(events(*STEP, ("pull k", 0, "inter", 2.5, 3.5, 50)), RATES)
    assert (times.attend, times.other, times.inter, times.outside, times.whole) == (3, 5, 0, 2, 10)
    assert times.sync == 0 and times.inter_bytes == 50 and times.calls == 2


def test_what_is_not_hidden_is_moving_bytes_or_waiting_for_others() -> None:
    times = measure(events(*STEP, ("pull k", 0, "inter", 3, 6, 100)), RATES)  # 1 s for its bytes, 2 s not hidden
    assert (times.inter, times.sync) == (2, 1)
    times = measure(events(*STEP, ("wait o", 0, "intra", 7, 8.5, 0)))
    assert (times.intra, times.sync) == (1.5, 1.5), "without rates a wait for nothing is still a wait"


def test_both_links_at_once_count_once() -> None:
    times = measure(events(*STEP, ("pull k", 0, "inter", 4, 6, 0), ("pull v", 0, "intra", 4, 6, 0)), RATES)
    assert (times.inter, times.intra, times.other) == (2, 0, 3) and times.sync == 2


def test_ranks_add_up_and_the_idler_one_is_seen() -> None:
    other: tuple[Span, ...] = (
        ("step", 1, "compute", 0, 10, 0),
        ("pass", 1, "compute", 1, 9, 0),
        ("wait o", 1, "inter", 2, 9, 0),
        ("between steps", 1, "io", 0.0, 0.5, 0),
        ("decode", 1, "compute", 10, 14, 0),
    )
    times = measure(events(*STEP, *other), RATES)
    assert (times.ranks, times.steps, times.whole, times.imbalance) == (2, 1, 20, 7)
    assert times.launch == 0.5 and times.decode == 4 and times.attend == 3


def test_steps_without_details_are_taken_to_be_like_those_with_them() -> None:
    """Three steps alike, of which the first one's transfers and attention are recorded, or all."""
    first: tuple[Span, ...] = (*STEP, ("pull k", 0, "inter", 3, 6, 100), ("between steps", 0, "io", 0.0, 0.5, 0))

    def at(step: int) -> tuple[Span, ...]:
        return tuple((name, rank, lane, a + 10 * step, b + 10 * step, size) for name, rank, lane, a, b, size in first)

    whole = measure(events(*at(0), *at(1), *at(2)), RATES)
    outer = [span for step in (1, 2) for span in at(step) if span[0] in ("step", "pass", "between steps")]
    assert measure(events(*at(0), *outer), RATES) == replace(whole, detailed=1)
    assert (whole.detailed, whole.attend, whole.calls, whole.inter_bytes, whole.launch) == (3, 9, 6, 300, 1.5)


@pytest.mark.parametrize("graph", [False, True])
def test_the_time_of_a_stream_is_told_apart_as_it_was_spent(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided steps, two passes each, launched one by one or replayed: the second waits for the first, not for the host;
    after each step the host takes 1.5 ms until it launches again."""
    model, steps = Model(Device(), graph, 2, monkeypatch), list[Span]()
    model.spans.begin()
    for _ in range(6):
        start = model.device.now()
        model.step()
        steps.append(("step", 0, "compute", start, model.device.host - 0.5 * MS, 0))
    model.spans.read()
    times = measure(events(*steps, *((name, 0, lane, a, b, 0) for name, lane, a, b in model.rows)))
    attend, rest = (6 * 2 * 2 * seconds for seconds in Model.LAYER_S)
    assert (times.attend, times.other) == (pytest.approx(attend, rel=1e-3), pytest.approx(rest, rel=1e-3))
    assert times.launch == pytest.approx(5 * 1.5 * MS, rel=1e-2)
    assert times.outside == pytest.approx(times.launch + 1 * MS, abs=1 * MS), "and before the first launch"
    assert times.calls == 24 and times.sync == times.inter == times.intra == 0


def test_no_steps_no_times() -> None:
    assert measure(np.empty(0, EVENT)) == Times()
    assert measure(events(("decode", 0, "compute", 1, 3, 0))) == Times(decode=2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["attend", "pull k", "pass"]), st.integers(0, 2), st.integers(0, 90), st.integers(1, 40)
        ),
        max_size=30,
    )
)
def test_the_parts_add_up_to_the_whole(spans: list[tuple[str, int, int, int]]) -> None:
    lanes = {"attend": "compute", "pass": "compute", "pull k": "inter"}
    inside = [(n, r, lanes[n], a, min(a + d, 99), d) for n, r, a, d in spans]
    steps = [("step", rank, "compute", 0, 99, 0) for rank in range(3)]
    times = measure(events(*steps, *inside), RATES)
    parts = times.attend + times.other + times.inter + times.intra + times.outside
    assert times.whole == 3 * 99 and parts == pytest.approx(times.whole)
    assert 0 <= times.sync <= times.inter + times.intra
    cells = {(r, t) for n, r, _, a, b, _ in inside if n == "attend" for t in range(int(a), int(b))}
    assert times.attend == pytest.approx(len(cells)), "a union, second by second"

"""Spans: what is noted, when, and that noting costs next to nothing."""

import threading
import time

import numpy as np
import pytest

from hpcdit.output.trace import EVENT, Trace


def test_a_span_comes_out_as_it_went_in_on_the_clock_of_rank_0() -> None:
    trace = Trace(rank=3, level=1, offset=100.0)
    trace.record("pull k", "inter", 1.5, 2.25, 4096)
    (event,) = trace.take()
    assert event.item() == (b"pull k", 3, b"inter", 101.5, 102.25, 4096)


def test_the_columns_are_the_ones_promised() -> None:
    assert EVENT.names == ("name", "rank", "lane", "start", "end", "bytes")


def test_taking_forgets_what_was_taken() -> None:
    trace = Trace(0, 1)
    trace.record("a", "io", 0.0, 1.0)
    assert [len(trace.take()), len(trace.take())] == [1, 0]
    assert trace.take().dtype == EVENT


def test_a_span_takes_the_time_of_its_body_even_if_that_raises() -> None:
    trace = Trace(0, 1)
    before = trace.now()
    with pytest.raises(KeyError), trace.span("step", "compute", 7):
        time.sleep(0.02)
        raise KeyError
    after = trace.now()
    (event,) = trace.take()
    assert before <= event["start"] < event["end"] <= after
    assert event["end"] - event["start"] >= 0.02 and event["bytes"] == 7


def test_level_0_notes_nothing() -> None:
    trace = Trace(0, 0)
    trace.record("a", "io", 0.0, 1.0)
    with trace.span("b", "io"):
        pass
    assert len(trace.take()) == 0


@pytest.mark.parametrize(("level", "wanted"), [(0, [False, False]), (1, [True, False]), (2, [True, True])])
def test_a_loop_gets_a_recorder_only_for_a_level_that_is_wanted(level: int, wanted: list[bool]) -> None:
    trace = Trace(0, level)
    recorders = [trace.recorder(1), trace.recorder(2)]
    assert [recorder is not None for recorder in recorders] == wanted
    for recorder in recorders:
        if recorder:
            recorder("a", "intra", 0.0, 1.0, 8)
    assert len(trace.take()) == sum(wanted)


def test_an_offset_that_is_set_later_holds_for_what_was_noted_before() -> None:
    trace = Trace(0, 1)
    trace.record("a", "io", 1.0, 2.0)
    trace.offset = -1.0
    assert trace.take()["start"].tolist() == [0.0]


@pytest.mark.parametrize("name", ["n" * 100, "größe", "\ud800\0x", ""])
def test_any_name_is_held_in_39_bytes_of_ascii(name: str) -> None:
    trace = Trace(0, 1)
    trace.record(name, "a lane that is too long", 0.0, 1.0)
    (event,) = trace.take()
    assert event["name"] == name.encode("ascii", "backslashreplace")[:39]
    assert event["lane"] == b"a lane "


def test_no_span_is_lost_or_doubled_when_threads_record_while_another_takes() -> None:
    trace, threads, each = Trace(0, 2), 4, 5000
    taken: list[np.ndarray] = []

    def record(number: int) -> None:
        for i in range(each):
            trace.record("x", "io", 0.0, 1.0, number * each + i)

    workers = [threading.Thread(target=record, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        taken.append(trace.take())
    taken.append(trace.take())
    assert sorted(np.concatenate(taken)["bytes"]) == list(range(threads * each))


def test_a_span_costs_about_a_microsecond() -> None:
    def cost() -> float:
        record = Trace(0, 2).recorder(2)
        assert record
        start = time.perf_counter()
        for _ in range(10_000):
            record("pull k", "inter", 1.0, 2.0, 4096)
        return (time.perf_counter() - start) / 10_000

    assert min(cost() for _ in range(5)) < 3e-6  # .25e-6 on an idle core of 2024

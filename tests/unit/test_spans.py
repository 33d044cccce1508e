"""Spans by the events of a device: a made-up one, with a clock of its own that goes wrong by a known amount."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hpcdit.models.graphs import Passes
from hpcdit.spans import Spans, StreamSpans
from hpcdit.transport.base import Traffic

MS = 1e-3
SKEW_MS, RATE = 5e6, 1 + 1e-4  # the device's clock beside the host's: where it stood at 0, and how fast it goes
NEAR = 50e-6  # seconds: what the rate makes of a step, and what a call costs the host


class Event:
    def __init__(self, device: "Device") -> None:
        self.device, self.time = device, float("nan")

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.time)

    def elapsed_time(self, other: "Event") -> float:
        self.device.log.append("read")
        assert max(self.time, other.time) <= self.device.host, "an event that is not completed"
        return self.device.shown_ms(other.time) - self.device.shown_ms(self.time)


class Device:
    """A stream that works behind the host's back, another without work, graphs, and the host's own time."""

    def __init__(self, in_graphs: bool = True) -> None:
        self.host, self.busy_until, self.in_graphs = 100.0, 0.0, in_graphs
        self.recording: list[Callable[[], None]] | None = None
        self.log: list[str] = []
        self.open: list[str] = []
        self.captures = 0

    def shown_ms(self, time: float) -> float:
        return SKEW_MS + RATE * time / MS

    def now(self) -> float:
        self.host += 1e-6
        return self.host

    def enqueue(self, call: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(call)
        else:
            call()

    def work(self, seconds: float) -> None:
        def run() -> None:
            self.busy_until = max(self.busy_until, self.host) + seconds

        self.enqueue(run)

    def wait(self) -> None:
        self.host = max(self.host, self.busy_until)

    # As spans.Clock

    def mark(self, captured: bool) -> Event | None:
        assert captured == (self.recording is not None)
        if captured and not self.in_graphs:
            return None
        event = Event(self)
        self.enqueue(lambda: setattr(event, "time", max(self.busy_until, self.host)))
        return event

    def aside(self) -> Event:
        event = Event(self)
        event.time = self.host + 2e-6
        return event

    def push(self, name: str) -> None:
        self.open.append(name)

    def pop(self) -> None:
        self.open.pop()

    # As torch.cuda's graphs

    def graph(self) -> Any:
        device = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], None]] = []

            def replay(self) -> None:
                device.log.append("launch")
                for call in self.calls:
                    call()

            def pool(self) -> int:
                return 1

        return Graph()

    @contextmanager
    def capture(self, graph: Any, **_: Any) -> Iterator[None]:
        self.captures += 1
        self.recording = graph.calls = []
        try:
            yield
        finally:
            self.recording = None


class Model:
    """Passes of two layers, through graphs or not, and the engine's loop around them."""

    LAYER_S = 30 * MS, 10 * MS  # attention, and the rest

    def __init__(
        self, device: Device, graph: bool, level: int, monkeypatch: pytest.MonkeyPatch, passes: int = 2
    ) -> None:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", device.graph)
        monkeypatch.setattr(torch.cuda, "graph", device.capture)
        monkeypatch.setattr(torch.cuda, "synchronize", device.wait)
        self.device, self.passes = device, passes
        self.rows: list[tuple[str, str, float, float]] = []
        self.truth: list[list[tuple[float, float]]] = []  # of each step, the attends
        self.fails = False

        def record(name: str, lane: str, start: float, end: float, nbytes: int) -> None:
            self.rows.append((name, lane, start, end))

        self.spans = StreamSpans(record if level > 1 else None, device.now, record if level else None, device)
        self.traffic = Traffic()
        self.forward = Passes(self.compute, graph)
        self.forward.begin(self)  # type: ignore[arg-type]

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.traffic.add(Traffic(3, 5))
        for _ in range(2):
            start = self.spans.start("attend")
            self.device.enqueue(lambda: self.truth[-1].append((max(self.device.busy_until, self.device.host),) * 2))
            self.device.work(self.LAYER_S[0])
            self.device.enqueue(lambda: self.truth[-1].append((self.truth[-1].pop()[0], self.device.busy_until)))
            if self.fails:
                raise RuntimeError("a layer")
            self.spans.end("attend", "compute", start)
            self.device.work(self.LAYER_S[1])
        return (x + 1,)

    def step(self) -> None:
        self.truth.append([])
        for _ in range(self.passes):
            self.device.host += 1 * MS
            self.forward(x=torch.zeros(2))
        self.device.wait()
        self.spans.waited()
        self.device.log.append("waited")
        self.device.host += 0.5 * MS

    def video(self, steps: int, detailed: float = math.inf) -> None:
        self.spans.begin(detailed)
        for _ in range(steps):
            self.step()
        self.spans.read()

    def times(self, name: str) -> list[tuple[float, float]]:
        return [(start, end) for found, _, start, end in self.rows if found == name]


def assert_near(found: list[tuple[float, float]], wanted: list[tuple[float, float]]) -> None:
    assert len(found) == len(wanted)
    for pair, true in zip(found, wanted, strict=True):
        assert pair == pytest.approx(true, abs=NEAR)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_attends_are_where_the_device_made_them_in_every_step_of_every_video(
    graph: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(Device(), graph, 2, monkeypatch, passes)
    for _ in range(3):
        model.video(5)
        model.device.host += 1000  # in which the clocks drift apart by a tenth of a second
    assert_near(model.times("attend"), [pair for step in model.truth for pair in step])
    assert len(model.times("attend")) == 3 * 5 * passes * 2
    whole = model.times("pass")
    assert len(whole) == 3 * 5 * passes
    assert all(end - start == pytest.approx(80 * MS, abs=NEAR) for start, end in whole)
    assert not model.device.open, "as many ranges end as begin"


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("detailed", [1, 2])
def test_after_so_many_steps_of_a_video_passes_alone_are_timed(
    graph: bool, detailed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(Device(), graph, 2, monkeypatch)
    for _ in range(2):
        model.video(5, detailed)
    first = [step for start in (0, 5) for step in model.truth[start : start + detailed]]
    assert_near(model.times("attend"), [pair for step in first for pair in step])
    assert len(model.times("pass")) == 2 * 5 * 2 and not model.device.open


def test_times_are_read_behind_the_next_launch_which_takes_one_graph_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Device(), True, 2, monkeypatch)
    model.video(4)
    log = model.device.log
    after = {log[i + 1] for i, what in enumerate(log[:-1]) if what == "waited"}
    assert after == {"launch", "read"} and log[-1] == "read"  # the last step's, with nothing to launch
    assert all(log[i + 1] == "launch" for i in [i for i, what in enumerate(log) if what == "waited"][:-1])
    assert model.device.captures == 3


@pytest.mark.parametrize(("level", "names"), [(0, set()), (1, {"pass", "between steps"})])
def test_without_spans_of_steps_a_pass_is_captured_once(
    level: int, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(Device(), True, level, monkeypatch)
    model.video(4)
    model.video(4)
    assert model.device.captures == 1 and {row[0] for row in model.rows} == names


@pytest.mark.parametrize("graph", [False, True])
def test_bytes_are_counted_in_each_pass_that_is_made_or_replayed(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Device(), graph, 0, monkeypatch)
    model.video(4)
    assert model.traffic == Traffic(4 * 2 * 3, 4 * 2 * 5)


@pytest.mark.parametrize("graph", [False, True])
def test_between_steps_is_from_the_wait_to_the_launch(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Device(), graph, 2, monkeypatch)
    model.video(3)
    model.device.host += 10
    model.video(3)
    between = [(lane, end - start) for name, lane, start, end in model.rows if name == "between steps"]
    assert between == [("io", pytest.approx(1.5 * MS, abs=NEAR))] * 4


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_fails_leaves_nothing_behind(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Device(), graph, 2, monkeypatch)
    model.spans.begin()
    model.step()
    model.fails = True
    with pytest.raises(RuntimeError, match="a layer"):
        model.step()  # where there are graphs, in the capture of a second one, since the first is not read
    model.fails = False
    model.device.open.clear()
    model.rows.clear()
    model.truth.clear()
    captures = model.device.captures
    model.video(3)
    assert_near(model.times("attend"), [pair for step in model.truth for pair in step])
    assert len(model.times("attend")) == 3 * 2 * 2
    assert model.device.captures <= captures + 2 * graph


def test_where_graphs_hold_no_events_their_passes_are_timed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Device(in_graphs=False), True, 2, monkeypatch)
    model.video(3)
    assert len(model.times("attend")) == 2, "of the pass that ran as it is"
    assert len(model.times("pass")) == 6 and model.device.captures == 1


def test_the_host_times_its_own_steps() -> None:
    rows: list[tuple[Any, ...]] = []
    clock = iter(range(100))
    spans = Spans(lambda *row: rows.append(row), lambda: float(next(clock)), lambda *row: rows.append(row))
    spans.begin()
    for _ in range(2):
        with spans.launch():
            start = spans.start("attend")
            spans.end("attend", "compute", start, 7)
        spans.waited()
    spans.read()
    assert rows == [
        ("attend", "compute", 1.0, 2.0, 7),
        ("pass", "compute", 0.0, 3.0, 0),
        ("between steps", "io", 4.0, 5.0, 0),
        ("attend", "compute", 7.0, 8.0, 7),
        ("pass", "compute", 6.0, 9.0, 0),
    ]
    untimed = Spans(None, lambda: pytest.fail("the clock is read"))
    untimed.end("attend", "compute", untimed.start("attend"))

"""Times of what a rank computes: by the host's clock, or, where a stream computes, by events on the stream."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

Record = Callable[[str, str, float, float, int], None]  # name, lane, start, end (seconds), bytes

TRIES = 5  # readings of both clocks, of which the closest counts


class Ranges(Protocol):
    """Named ranges of the calling thread, for a profiler of the device."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


class Event(Protocol):
    """As torch.cuda.Event."""

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds from this event to `other`."""


class Clock(Ranges, Protocol):
    """The clock of a device with streams."""

    def mark(self, captured: bool) -> Event | None:
        """An event that the current stream records.

        captured: in a graph, so that each replay records it anew; None where that is not to be had.
        """

    def aside(self) -> Event:
        """An event that a stream records that has nothing else to do."""


@dataclass(frozen=True)
class Mark:
    """A span of which the device knows the times."""

    record: Record
    name: str
    lane: str
    nbytes: int
    first: Event
    last: Event


@dataclass
class Tape:
    """What a captured pass marks. unread: by a replay whose times would be lost with the next one."""

    marks: list[Mark] = field(default_factory=list)
    unread: bool = False


@dataclass
class Batch:
    """What was marked between two waits for the device. zero_s: the host's time of `zero`, which was before it all."""

    zero: Event
    zero_s: float
    marks: list[Mark] = field(default_factory=list)
    tapes: list[Tape] = field(default_factory=list)


class Spans:
    """Times steps of a schedule, passes of a model and what is between them, where a trace wants them.

    Here by the host's clock. record: of a schedule's steps; outer: of all else; None: not wanted. now: the host's
    clock, in seconds.
    """

    def __init__(self, record: Record | None, now: Callable[[], float], outer: Record | None = None) -> None:
        self.record, self.now, self.outer = record, now, outer
        self._record, self._detailed = record, math.inf  # steps yet in which `record` is wanted
        self._waited: float | None = None

    def start(self, name: str) -> Any:
        """The start of a step; for `end`."""
        return self.now() if self.record else 0.0

    def end(self, name: str, lane: str, start: Any, nbytes: int = 0) -> None:
        if self.record:
            self.record(name, lane, start, self.now(), nbytes)

    @contextmanager
    def launch(self, tape: Tape | None = None) -> Iterator[None]:
        """The body launches a pass. tape: of the graph that it replays."""
        self._launching()
        start = self.now()
        yield
        if self.outer:
            self.outer("pass", "compute", start, self.now(), 0)

    @contextmanager
    def capture(self) -> Iterator[Tape]:
        """The body captures a pass in a graph."""
        yield Tape()

    def begin(self, detailed: float = math.inf) -> None:
        """Before the first pass of a video. What an earlier one has left unfinished is forgotten.

        detailed: after so many steps, those of the schedule are recorded no more.
        """
        self._waited, self._detailed = None, detailed
        self.record = self._record if detailed > 0 else None

    def waited(self) -> None:
        """To be called at the end of each step, when the device has done all that it was given."""
        self._waited, self._detailed = self.now(), self._detailed - 1
        if self._detailed <= 0:
            self.record = None

    def read(self) -> None:
        """Records what was marked before the last `waited`."""

    def _launching(self) -> None:
        if self.outer and self._waited is not None:
            self.outer("between steps", "io", self._waited, self.now(), 0)
        self._waited = None


class StreamSpans(Spans):
    """Times by events of the streams, which are read when nothing waits for the host: after the next pass's launch.

    Until it is read, a graph may not be replayed: see `Tape`.
    """

    def __init__(self, record: Record | None, now: Callable[[], float], outer: Record | None, clock: Clock) -> None:
        super().__init__(record, now, outer)
        self._clock = clock
        self._capturing: Tape | None = None
        self._batch: Batch | None = None  # of the step under way
        self._done: list[Batch] = []

    @property
    def _wanted(self) -> Record | None:
        """A graph outlives the steps that are recorded: it marks its own for those that follow."""
        return self._record if self._capturing else self.record

    def start(self, name: str) -> Event | None:
        if not self._wanted:
            return None
        self._clock.push(name)
        return self._clock.mark(self._capturing is not None)

    def end(self, name: str, lane: str, start: Event | None, nbytes: int = 0) -> None:
        if not (record := self._wanted):
            return
        self._note(record, name, lane, start, nbytes)
        self._clock.pop()

    def _note(self, record: Record, name: str, lane: str, first: Event | None, nbytes: int = 0) -> None:
        last, tape = self._clock.mark(self._capturing is not None), self._capturing or self._batch
        if first is not None and last is not None and tape is not None:
            tape.marks.append(Mark(record, name, lane, nbytes, first, last))

    @contextmanager
    def launch(self, tape: Tape | None = None) -> Iterator[None]:
        self._launching()
        first = self._clock.mark(False) if self.outer else None
        yield
        if self.outer:
            self._note(self.outer, "pass", "compute", first)
        if tape is not None and tape.marks and self._batch is not None and self.record:
            tape.unread = True
            self._batch.tapes.append(tape)
        self.read()

    @contextmanager
    def capture(self) -> Iterator[Tape]:
        self._capturing = tape = Tape()
        try:
            yield tape
        finally:
            self._capturing = None

    def begin(self, detailed: float = math.inf) -> None:
        super().begin(detailed)
        for batch in (*self._done, *([self._batch] if self._batch else [])):
            for tape in batch.tapes:
                tape.unread = False
        self._done.clear()
        self._batch = self._together()

    def _together(self) -> Batch:
        """An event whose time by the host's clock is known to some microseconds."""
        found = list[tuple[float, float, Event]]()
        for _ in range(TRIES):
            before = self.now()
            event = self._clock.aside()
            event.synchronize()
            after = self.now()
            found.append((after - before, (before + after) / 2, event))
        _, zero_s, zero = min(found, key=lambda each: each[0])
        return Batch(zero, zero_s)

    def waited(self) -> None:
        super().waited()
        if self._batch is not None:
            self._done.append(self._batch)
            # Not synchronised, since a stream without work records at once; anew each step, since clocks drift.
            self._batch = Batch(self._clock.aside(), self.now())

    def read(self) -> None:
        for batch in self._done:
            for mark in (*batch.marks, *(mark for tape in batch.tapes for mark in tape.marks)):
                start, end = (batch.zero_s + batch.zero.elapsed_time(e) / 1e3 for e in (mark.first, mark.last))
                mark.record(mark.name, mark.lane, start, end, mark.nbytes)
            for tape in batch.tapes:
                tape.unread = False
        self._done.clear()

"""Spans of time of one rank, cheap enough to be taken around every step of a schedule."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from ..spans import Ranges

# Fixed-length strings, so that h5py alone and h5dump show a table; the last byte of each is a NUL.
EVENT = np.dtype([("name", "S40"), ("rank", "i4"), ("lane", "S8"), ("start", "f8"), ("end", "f8"), ("bytes", "i8")])


class Trace:
    """Spans of one rank. Level 0: none; 1: stages and steps; 2: also every pull, attend and push.

    Times go in as this process reads its own clock (`now`, which is `time.perf_counter`) and come out of
    `take` on one clock for all ranks: `offset`, which may be set later, is rank 0's clock minus this rank's.
    Spans may be recorded from any thread. ranges: of the device's profiler, around the same steps.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self, rank: int, level: int, offset: float = 0.0, ranges: Ranges | None = None) -> None:
        self.rank, self.level, self.offset, self.ranges = rank, level, offset, ranges
        self._rows: list[tuple[str, str, float, float, int]] = []
        self._taking = threading.Lock()

    def record(self, name: str, lane: str, start: float, end: float, nbytes: int = 0) -> None:
        """Notes one span, unless the level is 0.

        lane: compute, inter, intra or io; start, end: readings of `now`, in seconds.
        """
        if self.level:
            self._rows.append((name, lane, start, end, nbytes))

    def recorder(self, level: int) -> Callable[[str, str, float, float, int], None] | None:
        """`record` for a hot loop whose spans belong to `level`; None where they are not wanted.

        A loop that gets None need not even read the clock.
        """
        return self.record if 0 < level <= self.level else None

    @contextmanager
    def span(self, name: str, lane: str, nbytes: int = 0) -> Iterator[None]:
        """Records the time its body takes, also if the body raises."""
        start = self.start(name)
        try:
            yield
        finally:
            self.end(name, lane, start, nbytes)

    def start(self, name: str) -> float:
        """The start of a span whose `end` the same thread will call."""
        if self.ranges and self.level:
            self.ranges.push(name)
        return self.now()

    def end(self, name: str, lane: str, start: float, nbytes: int = 0) -> None:
        self.record(name, lane, start, self.now(), nbytes)
        if self.ranges and self.level:
            self.ranges.pop()

    def take(self) -> np.ndarray:
        """The spans noted since the last call, in the order of recording, as EVENT [n]; forgets them."""
        with self._taking:
            # The list stays the same object: a thread that is about to append must not append to a lost one.
            rows = self._rows[:]
            del self._rows[: len(rows)]
        events = np.zeros(len(rows), EVENT)
        if rows:
            names, lanes, starts, ends, sizes = zip(*rows, strict=True)
            events["name"] = _fixed(names, EVENT["name"])
            events["lane"] = _fixed(lanes, EVENT["lane"])
            events["rank"] = self.rank
            events["start"] = np.array(starts) + self.offset
            events["end"] = np.array(ends) + self.offset
            events["bytes"] = sizes
        return events


def _fixed(texts: tuple[str, ...], dtype: np.dtype) -> list[bytes]:
    """ASCII of fixed length with room for the closing NUL; what is not ASCII is written as an escape."""
    codes = {text: text.encode("ascii", "backslashreplace")[: dtype.itemsize - 1] for text in set(texts)}
    return [codes[text] for text in texts]

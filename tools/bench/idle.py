"""What a run's traces say of idle time: per rank, how much of its steps the device computes, and what the host takes.

usage: python tools/bench/idle.py outputs/demo

busy: the share of the time from a video's first step to its last in which a pass of the model runs and does not wait
for another rank's data; waits are seen from trace.level=2 on. attend: the share in which attention does. between: the
host's milliseconds from the end of a step to the next launch.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

Intervals = np.ndarray  # [n, 2]: start and end, in seconds

WAITS = (b"pull q", b"pull k", b"pull v", b"pull x", b"wait o")


@dataclass
class Idle:
    """One rank's share in all videos, in seconds. starts: of the videos; between: one entry a step."""

    starts: set[float] = field(default_factory=set)
    steps: int = 0
    window_s: float = 0.0
    busy_s: float = 0.0
    attend_s: float = 0.0
    between: list[float] = field(default_factory=list)

    def add(self, events: np.ndarray) -> None:
        """events: of this rank in one video."""
        steps = _named(events, b"step")
        if not len(steps) or steps[:, 0].min() in self.starts:
            return  # videos that were denoised together have the same events
        self.starts.add(steps[:, 0].min())
        passes, waits = union(_named(events, b"pass")), union(_named(events, *WAITS))
        self.steps += len(steps)
        self.window_s += steps[:, 1].max() - steps[:, 0].min()
        self.busy_s += length(passes) - overlap(passes, waits)
        self.attend_s += length(union(_named(events, b"attend")))
        between = _named(events, b"between steps")
        self.between += list(between[:, 1] - between[:, 0])


def union(intervals: Intervals) -> Intervals:
    """The same times, as intervals that do not overlap."""
    found = list[list[float]]()
    for start, end in intervals[np.argsort(intervals[:, 0])]:
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found).reshape(-1, 2)


def length(intervals: Intervals) -> float:
    return float((intervals[:, 1] - intervals[:, 0]).sum())


def overlap(one: Intervals, other: Intervals) -> float:
    """Of two unions, the time that is in both."""
    return length(one) + length(other) - length(union(np.concatenate([one, other])))


def _named(events: np.ndarray, *names: bytes) -> Intervals:
    found = events[np.isin(events["name"], names)]
    return np.stack([found["start"], found["end"]], axis=1)


def read(folder: Path) -> dict[int, Idle]:
    """By rank. Raises SystemExit where there is nothing to read."""
    found: dict[int, Idle] = {}
    for path in sorted((folder / "videos").glob("*.h5")):
        with h5py.File(path) as file:
            events = file["trace/events"][:]
        for rank in np.unique(events["rank"]):
            found.setdefault(int(rank), Idle()).add(events[events["rank"] == rank])
    found = {rank: idle for rank, idle in sorted(found.items()) if idle.steps}
    if not found:
        raise SystemExit(f"{folder}: no traced steps of videos; allowed: output.dir of a run with trace.level=1 or 2")
    return found


def table(found: dict[int, Idle]) -> str:
    lines = ["rank  steps   busy   idle  attend  between: median ms      max"]
    for rank, idle in found.items():
        busy, attend = idle.busy_s / idle.window_s, idle.attend_s / idle.window_s
        ms = np.array(idle.between or [np.nan]) * 1e3
        lines.append(
            f"{rank:4}  {idle.steps:5}  {busy:5.1%}  {1 - busy:5.1%}  {attend:6.1%}"
            f"  {np.median(ms):18.3f}  {ms.max():7.3f}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How busy a run's ranks were in their steps, from its traces.")
    parser.add_argument("folder", type=Path, help="output.dir of the run")
    print(table(read(parser.parse_args(words).folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

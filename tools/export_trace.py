"""Writes a video's trace as a JSON file for https://ui.perfetto.dev or chrome://tracing.

usage: python tools/export_trace.py outputs/demo/videos/ID.h5 -o trace.json

Ranks are its processes, lanes its threads; names are those of the NVTX ranges. A job.h5 has a trace, too: the start.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdit.output import atomic
from hpcdit.output.trace import EVENT

LANES = ("compute", "inter", "intra", "io")
TRACKS = 100  # of a lane, at most: spans that overlap without one being inside the other need one each


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a video's trace for https://ui.perfetto.dev.")
    parser.add_argument("video", type=Path, help="a video file (.h5), or a job.h5")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"), help="default: %(default)s")
    arguments = parser.parse_args(words)
    try:
        events = read(arguments.video)
        text = json.dumps({"traceEvents": list(rows(events)), "displayTimeUnit": "ms"})
        atomic.write(arguments.output, text.encode(), replace=True)
    except (OSError, ValueError) as error:
        print("export_trace:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(events)} spans")
    return 0


def read(path: Path) -> np.ndarray:
    """EVENT [n] in the order of their starts, longer ones first."""
    try:
        with path.open("rb") as plain, h5py.File(plain, "r") as file:  # so HDF5 takes no lock
            events = file["trace/events"][:]
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: no trace of hpcdit in it ({error})") from None
    if events.dtype != EVENT:
        raise ValueError(f"{path}: its trace/events is not a table of events")
    return events[np.lexsort((-events["end"], events["start"]))]


def rows(events: np.ndarray) -> Iterator[dict[str, Any]]:
    """Chrome's trace events: microseconds from the first span; complete spans, each in a track where it nests."""
    zero = events["start"].min() if len(events) else 0.0
    open_ends: dict[tuple[int, str], list[list[float]]] = {}  # of each track, those of the spans it is inside of
    for event in events:
        rank, lane = int(event["rank"]), event["lane"].decode()
        tracks = open_ends.setdefault((rank, lane), [])
        thread = LANES.index(lane) * TRACKS + track(tracks, event["start"], event["end"])
        times = {"ts": (event["start"] - zero) * 1e6, "dur": (event["end"] - event["start"]) * 1e6}
        more = {"args": {"bytes": int(event["bytes"])}} if event["bytes"] else {}
        yield {"name": event["name"].decode(), "cat": lane, "ph": "X", "pid": rank, "tid": thread, **times, **more}
    for (rank, lane), tracks in open_ends.items():
        yield {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for number in range(len(tracks)):
            thread = LANES.index(lane) * TRACKS + number
            yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": thread, "args": {"name": lane}}


def track(tracks: list[list[float]], start: float, end: float) -> int:
    """The first track where the span nests; it is noted there."""
    for number, ends in enumerate(tracks):
        while ends and ends[-1] <= start:
            ends.pop()
        if not ends or end <= ends[-1]:
            ends.append(end)
            return number
    tracks.append([end])
    return len(tracks) - 1


if __name__ == "__main__":
    sys.exit(main())

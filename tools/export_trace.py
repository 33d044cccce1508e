"""Writes a video's trace as a JSON file for https://ui.perfetto.dev or chrome://tracing.

usage: python tools/export_trace.py outputs/demo/videos/ID.h5 -o trace.json

Ranks are its processes, lanes its threads; names are those of the NVTX ranges. Beside each rank stands what the
simulator foretold of its steps. A job.h5 has a trace, too: the start.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdit.output import atomic
from hpcdit.output.report.contents import prediction
from hpcdit.output.report.pricing import Priced
from hpcdit.output.trace import EVENT

LANES = ("compute", "inter", "intra", "io")
TRACKS = 100  # of a lane, at most: spans that overlap without one being inside the other need one each
FORETOLD = 200_000  # spans at most; of the steps after that only their length


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a video's trace for https://ui.perfetto.dev.")
    parser.add_argument("video", type=Path, help="a video file (.h5), or a job.h5")
    parser.add_argument("-o", "--output", type=Path, default=Path("trace.json"), help="default: %(default)s")
    arguments = parser.parse_args(words)
    try:
        events, priced = read(arguments.video)
        foretold = predicted(events, priced)
        zero = nanoseconds(events["start"].min()) if len(events) else 0
        tracks = [*rows(events, zero), *rows(foretold, zero, ", predicted", 1)]
        text = json.dumps({"traceEvents": tracks, "displayTimeUnit": "ms"})
        atomic.write(arguments.output, text.encode(), replace=True)
    except (OSError, ValueError) as error:
        print("export_trace:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(events)} spans" + f", {len(foretold)} predicted" * bool(len(foretold)))
    return 0


def read(path: Path) -> tuple[np.ndarray, Priced | None]:
    """EVENT [n]; and what prices the video's plan, where it is known."""
    priced = None
    try:
        with path.open("rb") as plain, h5py.File(plain, "r") as file:  # so HDF5 takes no lock
            events = file["trace/events"][:]
            with suppress(LookupError, ValueError, TypeError):
                priced = Priced.of(*(json.loads(file.attrs[name]) for name in ("plan", "sampling")))
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: no trace of hpcdit in it ({error})") from None
    if events.dtype != EVENT:
        raise ValueError(f"{path}: its trace/events is not a table of events")
    return events, priced


def predicted(events: np.ndarray, priced: Priced | None) -> np.ndarray:
    """EVENT [n]: the simulator's steps of every rank, each from where the measured one began; none without a price."""
    steps = np.sort(events[events["name"] == b"step"], order=["start", "rank"])
    if priced is None or not len(steps):
        return np.empty(0, EVENT)
    told, ranks = prediction(priced), np.unique(steps["rank"]).tolist()
    one = told["layer_s"] + told["rest_s"]
    inside = [_repeated(told, ranks.index(rank), one) for rank in ranks]
    found, count = [], 0
    for step in steps:
        whole, start = np.zeros(1, EVENT), step["start"]
        length = one * told["layers"] * told["passes"] if told["step_s"] is None else told["step_s"]
        whole[0] = b"step", step["rank"], b"compute", start, start + length, 0
        each = inside[ranks.index(step["rank"])].copy()
        count += len(each)
        if count > FORETOLD:
            each = each[:0]
        each["rank"], each["start"], each["end"] = step["rank"], each["start"] + start, each["end"] + start
        found += [whole, each]
    return np.concatenate(found)


def _repeated(told: Mapping[str, Any], place: int, one: float) -> np.ndarray:
    """EVENT [n]: all layers of a step of the rank at `place` of the group, from 0. Ranks alike are simulated once."""
    period = max((span[0] for span in told["spans"]), default=0) + 1
    mine = [span for span in told["spans"] if span[0] == place % told["ranks"] % period]
    layer = [(name.encode(), 0, lane.encode(), start, end, 0) for _, lane, name, start, end in mine]
    layer.append((b"other computing", 0, b"compute", told["layer_s"], one, 0))
    count = told["layers"] * told["passes"]
    spans = np.tile(np.array(layer, EVENT), count)
    shift = np.repeat(np.arange(count) * one, len(layer))
    spans["start"] += shift
    spans["end"] += shift
    return spans


def nanoseconds(seconds: float) -> int:
    return round(float(seconds) * 1e9)


def microseconds(ns: int) -> float:
    """As JSON has them. Perfetto multiplies by 1000 and cuts what follows the point: a little more is the same time."""
    return (ns + 0.25) / 1000


def rows(events: np.ndarray, zero: int, more: str = "", twin: int = 0) -> Iterator[dict[str, Any]]:
    """Chrome's trace events: microseconds from `zero` (ns); complete spans, each in a track where it nests, by whole
    nanoseconds, since Perfetto drops what does not nest. more, twin: of the processes that stand beside the ranks."""
    times = sorted((nanoseconds(event["start"]), -nanoseconds(event["end"]), i) for i, event in enumerate(events))
    open_ends: dict[tuple[int, str], list[list[int]]] = {}  # of each track, those of the spans it is inside of
    for start, end, event in ((start, -end, events[i]) for start, end, i in times):
        rank, lane = int(event["rank"]), event["lane"].decode()
        thread = _thread(rank, twin, lane, track(open_ends.setdefault((rank, lane), []), start, end))
        spent = {"ts": microseconds(start - zero), "dur": microseconds(end - start)}
        size = {"args": {"bytes": int(event["bytes"])}} if event["bytes"] else {}
        place = {"pid": _process(rank, twin), "tid": thread}
        yield {"name": event["name"].decode(), "cat": lane, "ph": "X", **place, **spent, **size}
    for rank in sorted({rank for rank, _ in open_ends}):
        process = {"ph": "M", "pid": _process(rank, twin)}
        yield {"name": "process_name", **process, "args": {"name": f"rank {rank}{more}"}}
        yield {"name": "process_sort_index", **process, "args": {"sort_index": _process(rank, twin)}}
    for (rank, lane), tracks in open_ends.items():
        process = {"ph": "M", "pid": _process(rank, twin)}
        for number in range(len(tracks)):
            thread = _thread(rank, twin, lane, number)
            yield {"name": "thread_name", **process, "tid": thread, "args": {"name": lane}}
            yield {"name": "thread_sort_index", **process, "tid": thread, "args": {"sort_index": thread}}


def _process(rank: int, twin: int) -> int:
    """Not 0, which is the idle process to Perfetto."""
    return 2 * rank + twin + 1


def _thread(rank: int, twin: int, lane: str, number: int) -> int:
    """No two processes have one of the same number."""
    return (_process(rank, twin) * len(LANES) + LANES.index(lane)) * TRACKS + number


def track(tracks: list[list[int]], start: int, end: int) -> int:
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

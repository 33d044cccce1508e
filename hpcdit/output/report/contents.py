"""What a report says: everything about a job that its page needs, from the catalog and from a few of the videos."""

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ..catalog import Catalog
from ..record import Row
from ..store import Parts, read_jobs, read_parts
from ..summary import Summary
from ..taxes import Times
from .pricing import Priced, advise

OPENED = 24  # videos whose traces are shown, at most: the slowest, the quickest, and the first ones
EVENTS = 400_000  # spans of all of them, 17 bytes each; of a video, a quarter of that
EMBEDDED = 16 << 20  # bytes of MP4 up to which all are part of the page; else they play from the folder beside it
LEVEL_1 = (b"encode", b"step", b"pass", b"between steps", b"decode", b"write")
LANES = (b"compute", b"inter", b"intra", b"io")


@dataclass
class Contents:
    """rows: of the page's table, see COLUMNS; pictures: of each row, base64 of a WebP or nothing; timelines: by row."""

    title: str
    rows: list[list[Any]]
    pictures: list[str]
    times: Times
    timelines: dict[int, dict[str, Any]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    advice: dict[str, Any] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    films: dict[int, str] = field(default_factory=dict)  # of each row with an MP4, where it is


COLUMNS = ("index", "id", "prompt", "seed", "status", "seconds", "reason", "ended", "shape", "sampling", "times")
TIMES = tuple(each.name for each in fields(Times))


def check(folder: Path) -> None:
    """Raises ValueError, one line, where there is nothing to report."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / "job.h5").is_file() and not (folder / "videos").is_dir():
        raise ValueError(f"{folder}: neither job.h5 nor videos/ in this folder; allowed: the output folder of a run")


def gather(folder: Path) -> Contents:
    """Reads the output folder of a job. Raises as `check` does."""
    check(folder)
    catalog, jobs = Catalog(folder), read_jobs(folder)
    every = [*jobs, *_strangers(jobs, catalog)]
    rows, pictures, done = list[list[Any]](), list[str](), list[tuple[int, float]]()
    total = dict.fromkeys(TIMES, 0)
    for at, row in enumerate(every):
        made, summary = _row(row, catalog)
        rows.append(made)
        pictures.append(summary.picture if summary else "")
        if summary:
            done.append((at, made[5]))
            for name, value in zip(TIMES, astuple(summary.times), strict=True):
                total[name] += value
    found = Contents(folder.resolve().name, rows, pictures, Times(**total))
    _films(found, folder)
    _open(found, folder, _chosen(done), len(done))
    return found


def _strangers(jobs: Sequence[Row], catalog: Catalog) -> Iterator[Row]:
    """Videos that no job of the index is about."""
    known = {job.id for job in jobs}
    last = max((job.index for job in jobs), default=-1)
    for i, id in enumerate(sorted(catalog.files.keys() - known), 1):
        yield Row(last + i, id, "", 0)


def _row(row: Row, catalog: Catalog) -> tuple[list[Any], Summary | None]:
    """A row of the page's table; a job without a whole video is as the index has it."""
    file = catalog.files.get(row.id)
    head = [row.index, row.id, row.prompt, str(row.seed)]
    if file is None:
        status = "pending" if row.status == "done" else row.status  # its file was removed
        return [*head, status, row.seconds, row.reason, None, None, None, None], None
    try:
        summary = catalog.summary(row.id)  # first: what opens a video for it need not open it for the entry
        entry = catalog.entry(row.id)
    except (ValueError, OSError) as error:
        return [*head, "failed", 0.0, str(error), None, None, None, None], None
    head[2:] = entry.prompt, str(entry.seed)
    times = list(summary.times.to_dict().values())
    ended = round(file.st_mtime_ns / 1e9, 3)
    return [*head, "done", entry.seconds, "", ended, list(summary.shape), entry.sampling, times], summary


def _films(found: Contents, folder: Path) -> None:
    sizes = dict[str, int]()
    with suppress(OSError):
        for file in os.scandir(folder / "videos"):
            if file.name.endswith(".mp4"):
                sizes[file.name.removesuffix(".mp4")] = file.stat().st_size
    inside = sum(sizes.values()) <= EMBEDDED
    for at, row in enumerate(found.rows):
        if row[1] in sizes:
            found.films[at] = f"videos/{quote(row[1])}.mp4"
            if inside:
                data = base64.b64encode((folder / "videos" / f"{row[1]}.mp4").read_bytes()).decode()
                found.films[at] = f"data:video/mp4;base64,{data}"


def _chosen(done: Sequence[tuple[int, float]]) -> list[int]:
    """The rows whose traces are shown: a few of the slowest and the quickest, then in their order."""
    by_time = [at for at, _ in sorted(done, key=lambda pair: pair[1])]
    first = [*by_time[::-1][: OPENED // 4], *by_time[: OPENED // 8]]
    return list(dict.fromkeys([*first, *(at for at, _ in done)]))[:OPENED]


def _open(found: Contents, folder: Path, chosen: Sequence[int], count: int) -> None:
    """Timelines, predictions and advice, from the videos themselves."""
    left, predictions, first = EVENTS, dict[str, int](), True
    for at in chosen:
        try:
            parts = read_parts(folder / "videos" / f"{found.rows[at][1]}.h5")
        except (ValueError, OSError):
            continue
        timeline = _timeline(parts.events, min(left, EVENTS // 4))
        left -= timeline["shown"]
        priced = Priced.of(parts.record.plan, parts.record.sampling)
        if priced:
            key = repr((priced.layout, priced.work, priced.fixed))
            if key not in predictions:
                predictions[key] = len(found.predictions)
                found.predictions.append(prediction(priced))
            timeline["prediction"] = predictions[key]
        if priced and first:
            first = False
            _advise(found, priced, parts, count)
        found.timelines[at] = {**timeline, **_about(parts)}
        if left <= 0:
            break


def _advise(found: Contents, priced: Priced, parts: Parts, count: int) -> None:
    advice = advise(priced, parts.record.model.get("dtype", ""))
    found.advice = {tax: each.to_dict() for tax, each in advice.items()}
    found.estimates = {
        "traffic": priced.traffic_s() * count,
        "calls": priced.calls_s(found.times.calls),
    }


def _about(parts: Parts) -> dict[str, Any]:
    plan = {key: value for key, value in parts.record.plan.items() if key != "priced"}
    return {"plan": plan, "cluster": parts.record.cluster, "model": parts.record.model}


def _timeline(events: np.ndarray, limit: int) -> dict[str, Any]:
    """The spans as columns in base64: start and end in seconds from the first, bytes, rank, name, lane."""
    total = len(events)
    if total > limit:
        events = thinned(events, limit)
    names, which = np.unique(events["name"], return_inverse=True)
    zero = float(events["start"].min()) if len(events) else 0.0
    lanes = np.searchsorted(np.array(sorted(LANES)), events["lane"])
    columns = {
        "start": (events["start"] - zero).astype("<f4"),
        "end": (events["end"] - zero).astype("<f4"),
        "bytes": events["bytes"].astype("<f4"),
        "rank": events["rank"].astype("<u2"),
        "name": which.astype("<u2"),
        "lane": lanes.astype("u1"),
    }
    return {
        "total": total,
        "shown": len(events),
        "names": [name.decode() for name in names],
        "lanes": [lane.decode() for lane in sorted(LANES)],
        **{key: base64.b64encode(column.tobytes()).decode() for key, column in columns.items()},
    }


def thinned(events: np.ndarray, limit: int) -> np.ndarray:
    """All stages, steps and passes as far as `limit` allows; of what is inside them the earliest spans."""
    coarse = np.isin(events["name"], LEVEL_1)
    order = np.lexsort((events["start"], ~coarse))[: max(limit, 0)]
    return events[np.sort(order)]


def prediction(priced: Priced) -> dict[str, Any]:
    """What the simulator says of a step: an attention layer's spans, and what is between two of them."""
    plan, layer, work = priced.best(priced.fixed), priced.layer(), priced.work
    passes = 2 if work.guided and priced.fixed.cfg == 1 else 1
    size = priced.layout.ulysses * priced.layout.ring
    return {
        "step_s": plan.step_s if plan else None,
        "exposed_s": plan.exposed_s if plan else None,
        "inter_bytes": plan.inter_bytes if plan else None,
        "intra_bytes": plan.intra_bytes if plan else None,
        "layer_s": layer.seconds,
        "attend_s": layer.compute_s,
        "rest_s": work.rest_s(size, priced.costs),
        "layers": work.layers,
        "passes": passes,
        "ranks": size,
        "spans": [[s.rank, s.lane, s.name, round(s.start, 9), round(s.end, 9)] for s in layer.spans[:5000]],
    }

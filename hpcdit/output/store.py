"""HDF5: one file a video, that says how it was made, and one index a job.

A file is built in memory and goes to disk in one piece (`atomic.write`): HDF5 2.0 ends in a segmentation
fault when it closes a file on a full disk.
"""

import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from . import atomic
from .arrays import write_events, write_frames, write_images
from .packing import INSTALL, WAYS, NoPlugin, lacks_plugin, load_plugin
from .record import Row, VideoRecord, storable, to_json
from .trace import EVENT

SCHEMA = "hpcdit/1"
_TEXTS = ("id", "prompt", "negative_prompt")
_DICTS = ("sampling", "model", "plan", "config", "software", "cluster")
_SEEDS = range(2**64)
# What reading a damaged file may end in.
_DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError)


def write_video(
    path: Path,
    frames: np.ndarray,
    record: VideoRecord,
    events: np.ndarray | Callable[[], np.ndarray],
    compression: str = "gzip",
) -> None:
    """Writes frames (uint8 [F, H, W, 3]), record and events (EVENT [n]) to `path`: whole, or not at all.

    events may be a function, called once the frames are packed, so that the span of that can be among them.
    compression: of `packing.WAYS`. Raises FileExistsError where `path` is taken, ValueError for what cannot be stored,
    OSError for what the disk refuses.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {frames.shape}")
    if compression not in WAYS:
        raise ValueError(f"compression must be one of {', '.join(WAYS)}, not {compression!r}")
    if lacks_plugin(compression):
        raise NoPlugin(f"compression {compression}: {INSTALL}")
    if record.seed not in _SEEDS:
        raise ValueError(f"seed must be at least 0 and below 2**64, not {record.seed}")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")  # known now rather than after the work
    image = io.BytesIO()
    with _create(image) as file:
        _write_record(file, record)  # first: it is then read from the head of the file
        write_frames(file, frames, record.fps, WAYS[compression])
        write_images(file, file["frames"])
        write_events(file, events() if callable(events) else events)
    atomic.write(path, image.getbuffer())


def read_record(path: Path) -> VideoRecord:
    """The record of a video. ValueError: the file is not ours or is damaged; OSError: as `open` raises it."""
    return read_video(path)[0]


def read_video(path: Path) -> tuple[VideoRecord, float]:
    """The record of a video, and the seconds that its trace covers, 0 where it has none. Raises as read_record does."""
    with _opened(path) as file:
        return _read_record(file.attrs, file["frames"], file["trace/events"]), _seconds(file)


def covered(events: np.ndarray) -> float:
    """Seconds from the first start to the last end of events (EVENT [n]); 0 where there are none."""
    return float(events["end"].max() - events["start"].min()) if len(events) else 0.0


@dataclass(frozen=True)
class Parts:
    """What a report needs of a video. middle: of its `count` frames, uint8 [H, W, 3]; events: EVENT [n]."""

    record: VideoRecord
    count: int
    middle: np.ndarray
    events: np.ndarray


def read_parts(path: Path) -> Parts:
    """Record, one frame and the trace of a video. Raises as read_record does."""
    with _opened(path) as file:
        frames, events = file["frames"], file["trace/events"]
        record, count = _read_record(file.attrs, frames, events), len(frames)
        load_plugin(frames)
        return Parts(record, count, frames[count // 2], events[:])


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    """The frames of a video, uint8 [F, H, W, 3], and how many a second. Raises as read_record does."""
    with _opened(path) as file:
        load_plugin(file["frames"])
        return file["frames"][:], float(file["frames"].attrs["fps"])


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """A video of ours; what its damage makes the body raise becomes ValueError.

    HDF5 reads through Python's file and so takes no lock: a file never changes once it has its name, and where there
    are no locks (some network file systems) HDF5 would refuse to open it, whatever h5py's `locking` says, if
    HDF5_USE_FILE_LOCKING is set.
    """
    with open(path, "rb") as plain:
        if plain.read(8) != b"\x89HDF\r\n\x1a\n":
            raise ValueError(f"{path}: not an HDF5 file")
        try:
            with h5py.File(plain, "r") as file:
                if (schema := _attribute(file.attrs, "schema", str)) != SCHEMA:
                    raise ValueError(f"its schema is {schema!r}, not {SCHEMA!r}")
                yield file
        except NoPlugin as error:
            raise NoPlugin(f"{path}: {error}") from None
        except _DAMAGE as error:
            raise ValueError(f"{path}: not a whole hpcdit video: {error}") from error


def read_jobs(output_dir: Path) -> tuple[Row, ...]:
    """The jobs as `job.h5` has them, in their order; none where it is missing or damaged."""
    try:
        with open(output_dir / "job.h5", "rb") as plain, h5py.File(plain, "r") as file:
            return tuple(_row(row) for row in file["jobs"][:])
    except _DAMAGE:
        return ()


def _row(row: np.void) -> Row:
    texts = {name: row[name].decode(errors="replace") for name in ("id", "prompt", "status", "reason")}
    return Row(index=int(row["index"]), seed=int(row["seed"]), seconds=float(row["seconds"]), **texts)


def software(mpi: str = "") -> dict[str, str]:
    """Versions of what made a video. mpi: what the MPI library says of itself."""
    versions = {"python": platform.python_version(), "hdf5": h5py.version.hdf5_version, "mpi": mpi}
    for name in ("hpcdit", "torch", "diffusers", "transformers", "numpy", "h5py", "mpi4py", "av"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class Index:
    """`<output_dir>/job.h5`: what has become of each job, with links to the videos. For one thread.

    The file is written anew each time (10,000 rows: .2 s), so `update` leaves out a write that would come
    sooner than `every` seconds, or 20 times what a write takes, after the last one. `write` ends a run.
    """

    def __init__(
        self, output_dir: Path, rows: Iterable[Row], every: float = 5.0, look: Callable[[], Sequence[Row]] = tuple
    ) -> None:
        """look: rows that other runs have changed since it was called last."""
        self.path = Path(output_dir) / "job.h5"
        self.every, self._look = every, look
        self._rows = {row.id: row for row in rows}
        self._due = self._look_due = 0.0

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows.values())

    def update(self, id: str, status: str, seconds: float = 0.0, reason: str = "") -> None:
        """Notes how a job ended (KeyError if it is none of ours), and writes the file if it is time."""
        self._rows[id] = replace(self._rows[id], status=status, seconds=seconds, reason=reason)
        if time.monotonic() >= self._due:
            self.write()

    def catch_up(self) -> bool:
        """Takes in what other runs have done, if it is time: to look takes long where there are many videos.

        Returns whether it was.
        """
        start = time.monotonic()
        if start < self._look_due:
            return False
        self._take(self._look())
        end = time.monotonic()
        self._look_due = end + max(self.every, 20 * (end - start))
        return True

    def _take(self, changed: Sequence[Row]) -> None:
        self._rows |= {row.id: row for row in changed if row.status != self._rows[row.id].status}

    def write(self, events: np.ndarray | None = None) -> None:
        """Writes the file now, in place of the old one. events: the job's own trace, EVENT [n].

        Of several runs, the one that writes last has all they did: it looks once more when it has written.
        """
        start, changed = time.monotonic(), self._look()
        while True:
            self._take(changed)
            self._write(events)
            if not (changed := self._look()):
                break
        end = time.monotonic()
        self._due = end + max(self.every, 20 * (end - start))

    def _write(self, events: np.ndarray | None) -> None:
        image = io.BytesIO()
        with _create(image) as file:
            file.attrs["schema"] = SCHEMA
            videos = file.create_group("videos")
            for row in self.rows:
                if row.status == "done":
                    videos[row.id] = h5py.ExternalLink(f"videos/{row.id}.h5", "/")
            # By its name at once: HDF5 2.0 gives the place of what is named later (`file["jobs"] = table`) away again.
            file.create_dataset("jobs", data=_table(self.rows))
            write_events(file, np.empty(0, EVENT) if events is None else events)
        atomic.write(self.path, image.getbuffer(), replace=True)


def _seconds(file: h5py.File) -> float:
    with suppress(*_DAMAGE):
        return covered(file["trace/events"][:])
    return 0.0


def _create(image: io.BytesIO) -> h5py.File:
    """In the format of HDF5 1.10: read widely, small, and with checksums on what describes the data."""
    return h5py.File(image, "w", libver=("v110", "v110"))


def _write_record(file: h5py.File, record: VideoRecord) -> None:
    """Strings have no fixed length: only so may an attribute be larger than 64 KiB.

    A text that HDF5 cannot hold is stored as near as can be, for people, and once more as JSON in `exact`.
    """
    file.attrs["schema"] = SCHEMA
    texts = {name: getattr(record, name) for name in _TEXTS}
    for name, text in texts.items():
        file.attrs[name] = storable(text)
    file.attrs["seed"] = np.uint64(record.seed)
    if record.image:
        file.attrs["image"] = record.image
    for name in _DICTS:
        file.attrs[name] = to_json(getattr(record, name))
    if exact := {name: text for name, text in texts.items() if storable(text) != text}:
        file.attrs["exact"] = json.dumps(exact)


def _read_record(found: h5py.AttributeManager, frames: h5py.Dataset, events: h5py.Dataset) -> VideoRecord:
    if not isinstance(frames, h5py.Dataset) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
        raise ValueError("/frames is not uint8 [F, H, W, 3]")
    if not isinstance(events, h5py.Dataset) or events.dtype != EVENT:
        raise ValueError("/trace/events is not a table of events")
    exact = json.loads(_attribute(found, "exact", str)) if "exact" in found else {}
    texts = {name: exact.get(name, _attribute(found, name, str)) for name in _TEXTS}
    dicts = {name: json.loads(_attribute(found, name, str)) for name in _DICTS}
    seed, fps = _attribute(found, "seed", np.integer).item(), _attribute(frames.attrs, "fps", np.number).item()
    image = _attribute(found, "image", str) if "image" in found else ""
    return VideoRecord(**texts, seed=seed, fps=fps, **dicts, image=image)


def _attribute(found: h5py.AttributeManager, name: str, kind: type) -> Any:
    try:
        value = found[name]
    except KeyError:
        raise ValueError(f"attribute {name} is missing") from None
    if not isinstance(value, kind):
        raise ValueError(f"attribute {name} is not what it should be: {value!r:.80}")
    return value


def _table(rows: tuple[Row, ...]) -> np.ndarray:
    text = h5py.string_dtype()
    columns = [("index", "i8"), ("id", text), ("prompt", text), ("seed", "u8")]
    table = np.empty(len(rows), [*columns, ("status", text), ("seconds", "f8"), ("reason", text)])
    for i, row in enumerate(rows):
        prompt, reason = storable(row.prompt), storable(row.reason)
        table[i] = (row.index, row.id, prompt, row.seed, row.status, row.seconds, reason)
    return table

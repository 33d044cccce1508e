"""What the finished videos of a folder hold, known without opening each of them: `<output_dir>/catalog.jsonl`.

A line a video, appended by whoever has written it: `["<checksum>", {...}]`. Only the videos themselves count. A line
that is torn, not ours, or of another size or time than its file is passed over; a video without a line is opened, and
gets one. So the catalog may be removed: the next start then opens every video once.
"""

import errno
import json
import os
import stat
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_origin

from .claims import failures
from .record import Row, VideoRecord
from .store import Index, covered, read_parts, read_video
from .summary import Summary

NAME = "catalog.jsonl"
LINE_BYTES = 1 << 24  # what a prompt and a negative prompt of the largest size take, escaped


@dataclass(frozen=True)
class Entry:
    """What is known about a finished video. size, mtime_ns: of its file; seconds: that it took; summary: what a report
    shows of it, empty where that was not noted."""

    id: str
    size: int
    mtime_ns: int
    prompt: str
    negative_prompt: str
    seed: int
    sampling: dict[str, Any]
    model: dict[str, Any]
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)
    image: str = ""

    @classmethod
    def of(cls, path: Path, file: os.stat_result, record: VideoRecord, seconds: float) -> "Entry":
        r = record
        texts = r.prompt, r.negative_prompt
        return cls(
            path.stem, file.st_size, file.st_mtime_ns, *texts, r.seed, r.sampling, r.model, seconds, image=r.image
        )

    def key(self) -> dict[str, Any]:
        """What identifies its content, as `Job.key` has it."""
        image = {"image": self.image} if self.image else {}
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt, "sampling": self.sampling, **image}


_KINDS: dict[str, Any] = {each.name: get_origin(each.type) or each.type for each in fields(Entry)}


def note(path: Path, record: VideoRecord, seconds: float, summary: Summary | None = None) -> None:
    """Appends the line of a video that was just written to `path` = `<output_dir>/videos/<id>.h5`.

    What goes wrong is passed over: the video is there, and the next start finds what it holds.
    """
    with suppress(OSError):
        entry = Entry.of(path, path.stat(), record, seconds)
        _append(path.parents[1], replace(entry, summary=summary.to_dict()) if summary else entry)


class Catalog:
    """The finished videos of an output folder, as of the last `refresh`. For one thread."""

    def __init__(self, output_dir: Path) -> None:
        self._folder = Path(output_dir)
        self._entries: dict[str, Entry] = {}
        self._read = 0  # bytes of the catalog
        self.files: dict[str, os.stat_result] = {}  # of the videos, by id
        self.refresh()

    def refresh(self) -> None:
        """Looks for videos, and reads what was appended since the last time."""
        try:
            there = [file for file in os.scandir(self._folder / "videos") if _is_video(file.name)]
        except OSError:
            there = []
        self.files = {}
        for file in there:
            with suppress(FileNotFoundError):
                self.files[file.name.removesuffix(".h5")] = file.stat(follow_symlinks=False)
        with suppress(OSError), os.fdopen(_open(self._folder, os.O_RDONLY), "rb") as lines:
            lines.seek(self._read)
            while line := lines.readline(LINE_BYTES):
                if line.endswith(b"\n") and (entry := _parse(line)):
                    self._entries[entry.id] = entry
                if line.endswith(b"\n") or len(line) == LINE_BYTES:  # else it is still being written
                    self._read = lines.tell()

    def entry(self, id: str) -> Entry:
        """What the video `id` holds. Raises ValueError, also for links and pipes, and OSError as read_record does."""
        if known := self._known(id):
            return known
        path = self._path(id)
        return self._learn(path, *read_video(path))

    def summary(self, id: str) -> Summary:
        """What a report shows of the video `id`; opens it where that was not noted. Raises as `entry` does."""
        if known := self._known(id):
            with suppress(TypeError, LookupError):
                return Summary.from_dict(known.summary)
        path = self._path(id)
        parts = read_parts(path)  # once for both: opening a video is what takes the time
        entry = self._learn(path, parts.record, covered(parts.events), Summary.of_parts(parts))
        return Summary.from_dict(entry.summary)  # as the next one will read it

    def _known(self, id: str) -> Entry | None:
        """What the catalog says of a video that is as it was then."""
        file, known = self.files.get(id), self._entries.get(id)
        return known if file and known and (known.size, known.mtime_ns) == (file.st_size, file.st_mtime_ns) else None

    def _path(self, id: str) -> Path:
        path, file = self._folder / "videos" / f"{id}.h5", self.files.get(id)
        if file and not stat.S_ISREG(file.st_mode):
            raise ValueError(f"{path}: not a regular file")
        return path

    def _learn(self, path: Path, record: VideoRecord, seconds: float, summary: Summary | None = None) -> Entry:
        entry = Entry.of(path, self.files.get(path.stem) or path.stat(), record, seconds)
        self._entries[path.stem] = entry = replace(entry, summary=summary.to_dict()) if summary else entry
        with suppress(OSError):
            _append(self._folder, entry)
        return entry


def rebuild(output_dir: Path, jobs: Iterable[Row] = (), shared: bool = False) -> Index:
    """The index of `output_dir` as its videos say, not yet written.

    A job is done if its file is whole, failed if its file is not, else as given. Files that are nobody's job
    follow in the order of their names. shared: other runs write videos, too, which the index goes on to look for.
    """
    jobs, catalog = tuple(jobs), Catalog(output_dir)
    known = {job.id: job for job in jobs}
    found = {id: _judge(catalog, known.get(id, Row(0, id, "", 0))) for id in sorted(catalog.files)}
    ahead = [found.pop(job.id, job) for job in jobs]
    last = max((job.index for job in jobs), default=-1)
    rows = ahead + [replace(row, index=last + i) for i, row in enumerate(found.values(), 1)]
    if not shared:
        return Index(output_dir, rows)
    missing = {row.id: row for row in rows if row.id not in catalog.files}
    failed: set[str] = set()

    def look() -> list[Row]:
        catalog.refresh()
        there = [_judge(catalog, missing.pop(id)) for id in list(missing) if id in catalog.files]
        new = {id: why for id, why in failures(output_dir).items() if id in missing and id not in failed}
        failed.update(new)
        return there + [replace(missing[id], status="failed", reason=why) for id, why in new.items()]

    return Index(output_dir, rows, look=look)


def _judge(catalog: Catalog, job: Row) -> Row:
    try:
        entry = catalog.entry(job.id)
    except (ValueError, OSError) as error:
        return replace(job, status="failed", reason=str(error))
    return replace(job, prompt=entry.prompt, seed=entry.seed, status="done", seconds=entry.seconds, reason="")


def _is_video(name: str) -> bool:
    return name.endswith(".h5") and not name.startswith(".")


def _open(folder: Path, flags: int) -> int:
    """A descriptor of the catalog. Raises OSError, also where it is no regular file of this folder."""
    descriptor = os.open(folder / NAME, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", NAME)
    return descriptor


def _append(folder: Path, entry: Entry) -> None:
    """In one write, so that lines of several writers do not mix; a newline first, in case one was cut off before."""
    content = json.dumps(vars(entry))
    line = f'\n["{zlib.crc32(content.encode()):08x}", {content}]\n'.encode()
    descriptor = _open(folder, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _parse(line: bytes) -> Entry | None:
    """The entry of a line; None where it is none of ours."""
    head, content = line[:13], line[13:].rstrip(b"\n").removesuffix(b"]")
    if head != b'["%08x", ' % zlib.crc32(content):
        return None
    try:
        values = {"summary": {}, "image": "", **json.loads(content)}  # lines of earlier versions have none
        return Entry(**values) if all(isinstance(values[key], kind) for key, kind in _KINDS.items()) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None

"""The prompts file: from lines to jobs.

`.txt`: a prompt a line; empty lines and lines that start with `#` do not count. `.jsonl`: a JSON object a
line with `prompt`, and where wanted `id`, `negative_prompt`, `image` and any key of `sampling`. Every fault is an
InputError of one line, `file:line: key: what is wrong; allowed: ...`, found while reading, line by line.
"""

import codecs
import difflib
import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcdit.command_line import one_line, shown
from hpcdit.config import Sampling
from hpcdit.errors import InputError
from hpcdit.keys import MAX_SEED, SAMPLING_RULES
from hpcdit.models.loading import ModelShape
from hpcdit.output.trace import EVENT
from hpcdit.render.picture import ALLOWED, digest

LINE_BYTES, FILE_BYTES, JOBS = 1 << 20, 1 << 26, 100_000  # each rank holds all jobs
ID_BYTES = 200  # file systems take names of 255 bytes, and the writer adds to this one
FIELDS = ("prompt", "id", "negative_prompt", "image", *SAMPLING_RULES)
ID_ALLOWED = (
    f"1 to {ID_BYTES} bytes of UTF-8 without /, \\, .., control characters, a leading . or -, or spaces at the ends"
)

TRACE_BYTES, TRACE_SHARE = 1 << 21, 4  # of a video's trace, and as much again as a quarter of its frames


@dataclass(frozen=True)
class Job:
    """One video to make: the `index`-th of the prompts file, written as `videos/<id>.h5`.

    image: the picture that it starts from, "" without one, and image_sha256 that of its file; where: file and line that
    it comes from, for messages.
    """

    index: int
    id: str
    prompt: str
    negative_prompt: str
    sampling: Sampling
    image: str = ""
    image_sha256: str = ""
    where: str = field(default="", compare=False)

    def key(self) -> dict[str, Any]:
        """What identifies the content of the video, in JSON's types: nothing of the rank or the machine."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "sampling": asdict(self.sampling),
            **({"image": self.image_sha256} if self.image else {}),
        }


@dataclass(frozen=True)
class Line:
    """A line of the prompts file, numbered from 1."""

    path: Path
    number: int
    text: str

    def error(self, what: str, allowed: str) -> InputError:
        return InputError(f"{self.path}:{self.number}: {what}; allowed: {allowed}")


def read(path: Path, defaults: Sampling) -> tuple[Job, ...]:
    """The jobs of a prompts file, in its order. Raises InputError.

    A job without a seed gets `defaults.seed` plus its index (past 2**63 - 1 it goes on from 0), one without
    an id gets its index and the first letters of its prompt.
    """
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"prompts: {shown(str(path))}; allowed: a file whose name ends in .txt or .jsonl")
    jobs: list[Job] = []
    lines: dict[str, tuple[str, int]] = {}
    for line in _lines(path):
        fields = parse(line)
        if fields is not None:
            if len(jobs) == JOBS:
                raise line.error("more videos", f"{JOBS} a file")
            job = _job(len(jobs), line, fields, defaults)
            _check_unique(job, line, lines)
            jobs.append(job)
    if not jobs:
        raise InputError(f"{path}: no prompt in it; allowed: at least one line with a prompt")
    return tuple(jobs)


def fits(jobs: Iterable[Job], defaults: Sampling, shape: ModelShape) -> None:
    """Raises InputError for the first job that the model cannot make: its line, or the key it has its size from."""
    for job in jobs:
        if shape.image != bool(job.image):
            what = "missing, this model starts from a picture" if shape.image else "this model takes none"
            raise InputError(f"{job.where}: image: {what}; allowed: {'a path in each line' if shape.image else 'none'}")
        try:
            s = job.sampling
            shape.legal(s.num_frames, s.height, s.width, s.max_sequence_length, s.scheduler, s.steps)
        except InputError as error:
            key = str(error).partition(":")[0]
            own = getattr(job.sampling, key) != getattr(defaults, key)
            raise InputError(f"{job.where}: {error}" if own else f"sampling.{error}") from None


def estimate_bytes(jobs: Iterable[Job], traced: bool = True) -> int:
    """Disk space that the jobs' videos take at most: frames as they are, uncompressed, and traces."""
    return sum(_frames_bytes(job.sampling) + traced * trace_bytes(job.sampling) for job in jobs)


def trace_bytes(s: Sampling) -> int:
    """What a video's trace may take, however many ranks and layers have a part in it."""
    return TRACE_BYTES + _frames_bytes(s) // TRACE_SHARE


def detailed_steps(s: Sampling, spans: int) -> int:
    """In how many steps pulls, attends and pushes are recorded, `spans` a step: one, and what there is room for."""
    return max(trace_bytes(s) // (spans * EVENT.itemsize), 1)


def _frames_bytes(s: Sampling) -> int:
    return 3 * s.num_frames * s.height * s.width


def _lines(path: Path) -> Iterator[Line]:
    """The file's lines, one at a time, each at most LINE_BYTES. Raises InputError."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
            raise InputError(f"prompts: {shown(str(path))} {what}; allowed: a .txt or .jsonl file")
        with path.open("rb") as file:
            number, size = 0, 0
            while data := file.readline(LINE_BYTES + 1):
                number, size = number + 1, size + len(data)
                line = _line(path, number, data)
                if size > FILE_BYTES:
                    raise line.error("a larger file", f"{FILE_BYTES} bytes a file")
                yield line
    except (OSError, ValueError) as error:  # ValueError: a name that no system call takes
        reason = getattr(error, "strerror", error)
        raise InputError(f"prompts: {shown(str(path))}: {reason}; allowed: a file that can be read") from None


def _line(path: Path, number: int, data: bytes) -> Line:
    if len(data) > LINE_BYTES:
        raise Line(path, number, "").error("a longer line", f"{LINE_BYTES} bytes a line")
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return Line(path, number, data.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        what = f"byte {data[error.start]:#04x} at column {error.start + 1} is not UTF-8"
        raise Line(path, number, "").error(what, "text in UTF-8") from None


def _plain(line: Line) -> dict[str, Any] | None:
    """A line of a .txt file as the fields of a job; None where it holds none."""
    text = line.text.strip()
    if "\r" in text:
        raise line.error("a carriage return inside a line", r"lines that end in \n or \r\n")
    return {"prompt": text} if text and not text.startswith("#") else None


def _object(line: Line) -> dict[str, Any] | None:
    """A line of a .jsonl file as the fields of a job; None where it holds none."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise line.error(f"{one_line(key, 80)}: there twice", "each key once")
            found[key] = value
        return found

    if not line.text.strip():
        return None
    try:
        fields = json.loads(line.text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise line.error(f"not JSON: {error.msg} at column {error.colno}", "a JSON object a line") from None
    except RecursionError:
        raise line.error("not JSON: nested too deep", "a JSON object a line") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise line.error("not JSON: a number with too many digits", "a JSON object a line") from None
    if not isinstance(fields, dict):
        raise line.error(f"{_shown(fields)} is not an object", "a JSON object a line")
    return fields


PARSERS: Mapping[str, Callable[[Line], dict[str, Any] | None]] = {".txt": _plain, ".jsonl": _object}


def _job(index: int, line: Line, fields: dict[str, Any], defaults: Sampling) -> Job:
    for key in fields:
        if key not in FIELDS:
            close = difflib.get_close_matches(key[:100], FIELDS, 1)
            meant = f", did you mean {close[0]}?" if close else ""
            raise line.error(f"{one_line(key, 80)}: unknown field{meant}", ", ".join(FIELDS))
    if "prompt" not in fields:
        raise line.error("prompt: missing", "a prompt in each line")
    prompt = _text(line, "prompt", fields["prompt"])
    if not prompt.strip():
        raise line.error("prompt: empty", "a prompt in each line")
    name = _id(line, fields["id"]) if "id" in fields else f"{index:05d}-{_slug(prompt)}".rstrip("-")
    values = {key: _sampling(line, key, value) for key, value in fields.items() if key in SAMPLING_RULES}
    values.setdefault("seed", (defaults.seed + index) % (MAX_SEED + 1))
    image, known = _image(line, fields["image"]) if "image" in fields else ("", "")
    return Job(
        index=index,
        id=name,
        prompt=prompt,
        negative_prompt=_text(line, "negative_prompt", fields.get("negative_prompt", "")),
        sampling=replace(defaults, **values),
        image=image,
        image_sha256=known,
        where=f"{line.path}:{line.number}",
    )


def _image(line: Line, value: object) -> tuple[str, str]:
    """A picture's path, which is relative to the prompts file's, and its digest. Raises InputError."""
    path = line.path.parent / _text(line, "image", value)
    try:
        return str(path.resolve()), digest(path)
    except ValueError as error:
        raise line.error(f"image: {shown(str(path))}: {error}", ALLOWED) from None


def _sampling(line: Line, key: str, value: object) -> Any:
    rule = SAMPLING_RULES[key]
    try:
        return rule.accept(value)
    except ValueError:
        raise line.error(f"{key}: {_shown(value)}", rule.allowed) from None


def _text(line: Line, key: str, value: object) -> str:
    """The value, if it is text that can be stored. Raises InputError."""
    if not isinstance(value, str):
        raise line.error(f"{key}: {_shown(value)}", "text")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise line.error(f"{key}: {shown(value)}", "text without NUL and without halves of surrogate pairs")
    return value


def _id(line: Line, value: object) -> str:
    """The value, if it can name a file and an HDF5 link everywhere. Raises InputError."""
    good = (
        isinstance(value, str)
        and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in value)
        and 0 < len(value.encode()) <= ID_BYTES
        and not any(part in value for part in ("/", "\\", ".."))
        and not value.startswith((".", "-"))
        and value == value.strip()
    )
    if not good:
        raise line.error(f"id: {_shown(value)}", ID_ALLOWED)
    return str(value)


def _check_unique(job: Job, line: Line, lines: dict[str, tuple[str, int]]) -> None:
    """Raises InputError where an earlier line has this id. Notes the id and its line in `lines` otherwise."""
    # Some file systems take names for the same that differ in case or in how an accent is coded.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", job.id).casefold())
    other, number = lines.setdefault(folded, (job.id, line.number))
    if number != line.number:
        same = "already used" if other == job.id else f"the same file as {shown(other)} on some systems, used"
        raise line.error(f"id: {shown(job.id)} is {same} in line {number}", "each id once")


def _slug(prompt: str) -> str:
    return "-".join(re.findall("[a-z0-9]+", prompt.lower()))[:40]


def _shown(value: object) -> str:
    if isinstance(value, dict | list):  # which may be nested too deep to be shown
        return "an object" if isinstance(value, dict) else "a list"
    return shown(value)

"""The rows of scaling.py: what is asked for, their file, the table of them, and what they say about the planner."""

import argparse
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from hpcdit.errors import InputError
from hpcdit.output import atomic

BEGUN = "begun"  # the note of a row that has no time yet
AUTO = "auto"  # asked of the planner
RIVAL = "yunchang"  # what is asked of it begins so
NEAR = 0.05  # by which the planner's pick may be slower than the best
GOAL = "720x1280", 8, 0.92  # of a step: its size, ranks, and speed-up / ranks at least
ORDER = "step", "attention", "batch"
HEAD = "what", "case", "ranks", "nodes", "asked", "plan", "ms", "speed-up", "/ ranks", "predicted / it", "note"
Key = tuple[str, str, int, int, str]


@dataclass(frozen=True)
class Row:
    """What took how long, on groups of so many ranks.

    what: step, attention or batch; case: its size; nodes: for which the ranks stand where the planner is asked; asked:
    auto, or what instead of that; plan: what came of it; seconds: None while it has none; predicted_s: by the planner.
    """

    what: str
    case: str
    ranks: int
    nodes: int
    asked: str
    plan: str = ""
    seconds: float | None = None
    predicted_s: float | None = None
    note: str = ""

    @property
    def key(self) -> Key:
        return self.what, self.case, self.ranks, self.nodes, self.asked

    @property
    def ours(self) -> bool:
        return not self.asked.startswith(RIVAL)


COLUMNS = tuple(field.name for field in fields(Row))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What scaling.py and scaling_groups.py, which it starts, both understand."""
    parser.add_argument("--csv", type=Path, default=Path("scaling.csv"), help="rows that are there are not measured")
    parser.add_argument("--small", action="store_true", help="short sequences and a tiny model: for a CPU")
    parser.add_argument("--groups", help="numbers of ranks, the first first; default: all, 1, and those between")
    parser.add_argument("--sizes", help="of steps, height x width; default: 720x1280,480x832")
    parser.add_argument("--lengths", help="of attention, tokens, k: 1024; default: 8k,32k,128k")


def turns(text: str | None, ranks: int) -> tuple[int, ...]:
    """The group sizes of --groups on so many ranks, the most worth first. Raises InputError."""
    if ranks < 1 or ranks & (ranks - 1):
        raise InputError(f"--ranks: {ranks}; allowed: a power of two")
    between = [ranks >> i for i in range(1, ranks.bit_length() - 1)]
    every = tuple(dict.fromkeys([ranks, 1, *between]))
    found = every if text is None else tuple(int(word) if word.isdigit() else 0 for word in text.split(","))
    if not set(found) <= set(every):
        raise InputError(f"--groups: {text!r}; allowed: a list of {', '.join(map(str, sorted(every)))}")
    return found


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of each of --sizes. Raises InputError."""
    found = [re.fullmatch(r"(\d+)x(\d+)", word) for word in text.split(",")]
    pairs = tuple((int(each[1]), int(each[2])) for each in found if each)
    if len(pairs) < len(found) or any(side % 16 or not side for pair in pairs for side in pair):
        raise InputError(f"--sizes: {text!r}; allowed: a list like 720x1280,480x832, of multiples of 16")
    return pairs


def lengths(text: str) -> tuple[int, ...]:
    """The tokens of each of --lengths. Raises InputError."""
    found = [re.fullmatch(r"(\d+)(k?)", word) for word in text.split(",")]
    tokens = tuple(int(each[1]) << 10 * bool(each[2]) for each in found if each)
    if len(tokens) < len(found) or 0 in tokens:
        raise InputError(f"--lengths: {text!r}; allowed: a list like 8k,32768")
    return tokens


# The file


def read(path: Path) -> dict[Key, Row]:
    """The last row of each key; none where there is no file. Raises InputError."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or COLUMNS) != COLUMNS:
            raise InputError(f"--csv: {path}: not of scaling.py; allowed: a file with the columns {', '.join(COLUMNS)}")
        rows = [_row(line, f"--csv: {path}, line {lines.line_num}") for line in lines]
    return {row.key: row for row in rows}


def _row(line: dict[str, str], where: str) -> Row:
    try:
        texts = {name: line[name] for name in ("what", "case", "asked", "plan", "note")}
        counts = {name: int(line[name]) for name in ("ranks", "nodes")}
        times = {name: float(line[name]) if line[name] else None for name in ("seconds", "predicted_s")}
        return Row(**texts, **counts, **times)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(f"{where}: not a row of scaling.py; allowed: {', '.join(COLUMNS)}") from None


def add(path: Path, row: Row) -> None:
    """Appends a row, which takes the place of the one with its key."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([COLUMNS] * new + [asdict(row).values()])


def write(path: Path, rows: Sequence[Row]) -> None:
    """All there is, one row a key. Raises OSError."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *(asdict(row).values() for row in rows)])
    atomic.write(path, text.getvalue().encode(), replace=True)


def settle(path: Path, why: str) -> None:
    """What was begun and has no time failed because of `why`."""
    write(path, [replace(row, note=why) if row.note == BEGUN else row for row in read(path).values()])


# What they say


def alone(rows: Sequence[Row], row: Row) -> Row | None:
    """The row of one rank that `row` is compared with."""
    same = (r for r in rows if (r.what, r.case, r.ranks) == (row.what, row.case, 1) and r.seconds)
    return min(same, key=lambda r: r.asked != AUTO, default=None)


def speedup(rows: Sequence[Row], row: Row) -> float | None:
    one = alone(rows, row)
    return one.seconds / row.seconds if one and one.seconds and row.seconds else None


def table(rows: Sequence[Row]) -> str:
    """All rows: of each case the most ranks first, and of these the quickest."""
    lines = [HEAD, *(_line(rows, row) for row in sorted(rows, key=_place))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _place(row: Row) -> tuple[object, ...]:
    what = ORDER.index(row.what) if row.what in ORDER else len(ORDER)
    return what, [-int(n) for n in re.findall(r"\d+", row.case)], row.case, -row.ranks, row.seconds or 1e9, row.key


def _line(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    names = row.what, row.case, str(row.ranks), str(row.nodes), row.asked, row.plan * (row.plan != row.asked)
    if not row.seconds:
        return *names, "-", "", "", "", row.note
    times = speedup(rows, row)
    share = "" if times is None else f"{times / row.ranks:.3f}"
    error = f"{row.predicted_s / row.seconds:.2f}" if row.predicted_s else ""
    return *names, f"{row.seconds * 1e3:.3f}", "" if times is None else f"{times:.2f}", share, error, row.note


def picks(rows: Sequence[Row]) -> list[str]:
    """Where the planner's pick is slower than another row of ours by more than NEAR, or else that it nowhere is."""
    found = list(_behind(rows))
    if not found:
        return ["the planner's picks: nothing to compare them with"]
    lines = [
        f"slower by {lost:.1%}: {_named(pick)} as {pick.nodes} nodes: {_told(pick)}; best: {_told(best)}"
        for lost, pick, best in sorted(found, key=lambda each: -each[0])
    ]
    far = sum(lost > NEAR for lost, _, _ in found)
    near = f"the planner's picks are within {NEAR:.0%} of the best of ours in {len(found) - far} of {len(found)} cells"
    return [*lines[:far], near] if far else [f"{near}; the worst is {lines[0]}"]


def _behind(rows: Sequence[Row]) -> Iterator[tuple[float, Row, Row]]:
    """(by how much it is slower, the planner's pick, the best other plan of ours for the same) where there are both."""
    done = [row for row in rows if row.seconds and row.ours]
    for pick in (row for row in done if row.asked == AUTO):
        same = [r for r in done if (r.what, r.case, r.ranks) == (pick.what, pick.case, pick.ranks)]
        others = [r for r in same if r.plan != pick.plan]
        if others and pick.seconds:
            best = min(others, key=lambda r: r.seconds or 0)
            yield max(pick.seconds / (best.seconds or 1) - 1, 0.0), pick, best


def _named(row: Row) -> str:
    return f"{row.what} {row.case} on {row.ranks}"


def _told(row: Row) -> str:
    return f"{row.plan} {(row.seconds or 0) * 1e3:.3f} ms"


def goal(rows: Sequence[Row]) -> str:
    """Whether a step scales as it should."""
    case, ranks, least = GOAL
    asked = next((r for r in rows if (r.what, r.case, r.ranks, r.asked) == ("step", case, ranks, AUTO)), None)
    times = asked and speedup(rows, asked)
    said = f"goal: a step of {case} on {ranks} ranks at {least} parallel efficiency or more: "
    if not times:
        return said + "not measured"
    return f"{said}{times / ranks:.3f}, {'reached' if times / ranks >= least else 'missed'}"

"""The benchmark's tables: a cell a layout and x, what follows from them, and the file of all cells."""

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

RANGE = 0.6, 2.5  # of x, in which the means are taken
CLOSE = 0.10  # what a prediction may be off; layouts nearer to each other than this have no order


@dataclass
class Cell:
    """One layout at one x; seconds of one layer.

    x: the transfer of USP in whole blocks alone / the compute alone. compute, transfer: each alone; times: measured,
    a chain each; predicted: by the simulator, where there is one.
    """

    x: float
    method: str
    compute: float
    transfer: float
    times: list[float] = field(default_factory=list)
    predicted: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def bound(self) -> float:
        return max(self.compute, self.transfer)

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.median - 1


def table(cells: Sequence[Cell]) -> str:
    """The cells of one x, in milliseconds a layer."""
    head = f"  {'method':32} {'transfer':>9} {'bound':>8} {'median':>8} {'min':>8} {'max':>8} {'predicted':>10}"
    rows = [head + f" {'error':>7} {'/ bound':>8}"]
    for c in cells:
        figures = (f"{value * 1e3:8.1f}" for value in (c.bound, c.median, min(c.times), max(c.times)))
        guess = f"{'-':>10} {'-':>7}" if c.predicted is None else f"{c.predicted * 1e3:10.1f} {c.error:+7.1%}"
        line = f"  {c.method:32} {c.transfer * 1e3:9.1f} {' '.join(figures)} {guess} {c.median / c.bound:8.2f} {c.note}"
        rows.append(line.rstrip())
    return "\n".join(rows)


@dataclass(frozen=True)
class Gain:
    """What ours gains at one x. ours: `auto`, or the quickest Torus; others: all that are neither.

    peers: the quickest of those that others have run: all but TAS in head groups, which is a cut of ours.
    """

    x: float
    ours: Cell
    best_other: Cell
    peers: Cell
    usp: Cell
    torus: Cell | None

    @property
    def over_best(self) -> float:
        return self.best_other.median / self.ours.median

    @property
    def over_peers(self) -> float:
        return self.peers.median / self.ours.median

    @property
    def over_usp(self) -> float:
        return self.usp.median / self.ours.median

    def __str__(self) -> str:
        torus = f"; Torus / its bound {self.torus.median / self.torus.bound:.2f}" if self.torus else ""
        return (
            f"  best other ({self.best_other.method}) / ours ({self.ours.method}) {self.over_best:.2f};"
            f" without TAS in groups ({self.peers.method}) {self.over_peers:.2f};"
            f" USP whole / ours {self.over_usp:.2f}{torus}"
        )


def gain(cells: Sequence[Cell], usp: str) -> Gain | None:
    """usp: the method column of USP with whole blocks. None where the cells hold nothing to compare."""
    autos = [c for c in cells if c.method.startswith("auto")]
    tori = [c for c in cells if c.method.startswith("torus")]
    others = [c for c in cells if c not in autos and c not in tori]
    whole = [c for c in cells if c.method == usp]
    peers = [c for c in others if not (c.method.startswith("tas") and "groups" in c.method)]
    if not (autos or tori) or not whole:
        return None
    torus = min(tori, key=lambda c: c.median) if tori else None
    ours = autos[0] if autos else torus
    assert ours is not None
    best, peer = (min(found, key=lambda c: c.median) for found in (others, peers))
    return Gain(cells[0].x, ours, best, peer, whole[0], torus)


def summary(gains: Sequence[Gain], rows: Sequence[Sequence[Cell]]) -> str:
    """What the run shows in all. rows: the cells of each x."""
    lines = []
    if inside := [g for g in gains if RANGE[0] <= g.x <= RANGE[1]]:
        for name, values in (
            ("USP whole / ours", [g.over_usp for g in inside]),
            ("best other / ours", [g.over_best for g in inside]),
            ("the same without TAS in groups", [g.over_peers for g in inside]),
        ):
            lines.append(
                f"{name}, {RANGE[0]} <= x <= {RANGE[1]}: mean {statistics.mean(values):.2f}, best {max(values):.2f}"
            )
    if gains:
        lines.append(f"ours / best other at worst: {max(1 / g.over_best for g in gains):.2f}")
    if bounds := [g.torus.median / g.torus.bound for g in gains if g.torus]:
        lines.append(f"quickest Torus / its bound at worst: {max(bounds):.2f}")
    errors = [c.error for row in rows for c in row if c.error is not None and not c.method.startswith("auto")]
    if errors:
        near = sum(abs(e) <= CLOSE for e in errors)
        right, pairs = order(rows)
        lines.append(
            f"simulator: {near} of {len(errors)} cells within {CLOSE:.0%} (worst {max(errors, key=abs):+.0%}),"
            f" order right in {right} of the {pairs} pairs that differ by over {CLOSE:.0%}"
        )
    return "\n".join(lines)


def order(rows: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    """Of all pairs of cells of one x whose medians differ clearly: in how many the simulator agrees; how many."""
    right = pairs = 0
    for row in rows:
        known = [c for c in row if not c.method.startswith("auto")]
        for slow in known:
            for fast in known:
                if slow.predicted is None or fast.predicted is None or slow.median <= fast.median * (1 + CLOSE):
                    continue
                pairs += 1
                right += slow.predicted > fast.predicted
    return right, pairs


def write(path: Path, cells: Sequence[Cell], kernels: str) -> None:
    """All cells as CSV, seconds."""
    names = [f.name for f in fields(Cell) if f.name != "times"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kernels", *names, "bound", "median", "min", "max", "repeats"])
        for c in cells:
            measured = (c.bound, c.median, min(c.times), max(c.times), len(c.times))
            writer.writerow([kernels, *(getattr(c, name) for name in names), *measured])

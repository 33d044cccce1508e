"""Where the time of a video's denoising went, as its trace tells: what computed, what waited, for what.

The three taxes are those of arXiv 2511.02168: waiting in bulk, data that leaves the chip between kernels, and launches.
The second is not in a trace; the report estimates it from bytes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

LINKS = ("inter", "intra")


@dataclass(frozen=True)
class Rates:
    """What a transfer takes at least: seconds, and bytes a second, of each link class."""

    inter: tuple[float, float]
    intra: tuple[float, float]

    @classmethod
    def of(cls, costs: Any) -> "Rates | None":
        """costs: the keys of cluster.costs; None where they are not there."""
        try:
            return cls(*((costs[f"{link}_latency_us"] / 1e6, costs[f"{link}_gb_s"] * 1e9) for link in LINKS))
        except (LookupError, TypeError):
            return None


@dataclass(frozen=True)
class Times:
    """Seconds, all ranks' together, from the first step's start to the last one's end: `whole`.

    attend, other: in a pass, at attention or at anything else that is no transfer; inter, intra: transfers behind which
    nothing attends; outside: no pass runs. These five add up to `whole`.
    detailed: steps in which transfers and attention are recorded, in the others they are taken to be as long. sync: of
    inter and intra, the waiting for other ranks: what is longer than the bytes take at the link's rate.
    launch: from a step's end to the next launch; imbalance: by which ranks compute less than the busiest.
    calls: of attention. encode, decode, write: of the rank that took longest.
    """

    ranks: int = 0
    steps: int = 0
    whole: float = 0.0
    attend: float = 0.0
    other: float = 0.0
    inter: float = 0.0
    intra: float = 0.0
    outside: float = 0.0
    sync: float = 0.0
    launch: float = 0.0
    imbalance: float = 0.0
    calls: int = 0
    inter_bytes: int = 0
    intra_bytes: int = 0
    encode: float = 0.0
    decode: float = 0.0
    write: float = 0.0
    detailed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """To the microsecond, since it stands in the catalog."""
        return {key: round(value, 6) for key, value in asdict(self).items()}


class _Cover:
    """The union of intervals."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray) -> None:
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], np.maximum.accumulate(ends[order]) if len(ends) else ends
        first = np.concatenate([[True], starts[1:] > ends[:-1]]) if len(starts) else np.zeros(0, bool)
        last = np.concatenate([first[1:], [True]]) if len(starts) else first
        self.starts, self.ends = starts[first], ends[last]
        self._points = np.stack([self.starts, self.ends], 1).ravel()
        lengths = np.cumsum(self.ends - self.starts)
        self._sums = np.stack([lengths - (self.ends - self.starts), lengths], 1).ravel()

    @property
    def seconds(self) -> float:
        return float(self._sums[-1]) if len(self._sums) else 0.0

    def within(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Of each interval the seconds that lie in this union."""
        if not len(self._points):
            return np.zeros(len(starts))
        return np.interp(ends, self._points, self._sums) - np.interp(starts, self._points, self._sums)


def measure(events: np.ndarray, rates: Rates | None = None) -> Times:
    """Reads a video's events (EVENT [n]). Without rates only waits for no bytes at all count as `sync`."""
    steps = events[events["name"] == b"step"]
    if not len(steps):
        return Times(**_aside(events))
    detailed = _detailed(events, steps)
    ranks = [_rank(events[events["rank"] == rank], rates, detailed) for rank in np.unique(steps["rank"])]
    total = {key: sum(rank[key] for rank in ranks) for key in ranks[0]}
    busy = [rank["attend"] + rank["other"] for rank in ranks]
    total["imbalance"] = sum(max(busy) - each for each in busy)
    return Times(ranks=len(ranks), steps=len(steps) // len(ranks), detailed=detailed, **total, **_aside(events))


def _detailed(events: np.ndarray, steps: np.ndarray) -> int:
    """In how many steps, the first, attention is recorded; all where it is in none."""
    rank = steps["rank"][0]
    first, mine = steps[steps["rank"] == rank], events[events["rank"] == rank]
    attends = mine["start"][mine["name"] == b"attend"]
    within = int((first["start"] < attends.max()).sum()) if len(attends) else 0
    return within or len(first)


def _aside(events: np.ndarray) -> dict[str, Any]:
    """What is before and after the steps, of the rank that took longest."""
    found = dict[str, Any]()
    for name in ("encode", "decode", "write"):
        spans = events[events["name"] == name.encode()]
        found[name] = float((spans["end"] - spans["start"]).max(initial=0.0))
    return found


def _rank(mine: np.ndarray, rates: Rates | None, detailed: int) -> dict[str, Any]:
    """detailed: steps, the first, that all others are taken to be like."""
    steps = np.sort(mine[mine["name"] == b"step"], order="start")
    start, end, last = steps["start"].min(), steps["end"].max(), steps["end"][:detailed].max()
    between = _within(mine[mine["name"] == b"between steps"], start, end)
    found, times = _first(mine, start, last, rates), float((end - start) / (last - start)) if last > start else 1.0
    scaled = {key: round(value * times) if isinstance(value, int) else value * times for key, value in found.items()}
    return {**scaled, "launch": float((between["end"] - between["start"]).sum())}


def _first(mine: np.ndarray, start: float, end: float, rates: Rates | None) -> dict[str, Any]:
    """What a rank did from `start` to `end`."""
    mine = _within(mine, start, end)
    name, lane = mine["name"], mine["lane"]
    attends, passes = mine[name == b"attend"], _cover(mine[name == b"pass"])
    attend = _cover(attends)
    links = {link: mine[lane == link.encode()] for link in LINKS}
    busy, exposed = attend, {}
    for link in LINKS:  # what both links do counts as inter
        more = _Cover(*(np.concatenate([getattr(busy, at), links[link][at[:-1]]]) for at in ("starts", "ends")))
        exposed[link] = more.seconds - busy.seconds
        busy = more
    both = _Cover(*(np.concatenate([getattr(busy, at), getattr(passes, at)]) for at in ("starts", "ends")))
    outside = max(float(end - start) - both.seconds, 0.0)
    sync = sum(_waiting(links[link], attend, getattr(rates, link) if rates else None) for link in LINKS)
    return {
        "whole": float(end - start),
        "attend": attend.seconds,
        "other": both.seconds - busy.seconds,
        **exposed,
        "outside": outside,
        "sync": min(sync, exposed["inter"] + exposed["intra"]),
        "calls": len(attends),
        **{f"{link}_bytes": int(links[link]["bytes"].sum()) for link in LINKS},
    }


def _within(spans: np.ndarray, start: float, end: float) -> np.ndarray:
    middle = (spans["start"] + spans["end"]) / 2  # times of a stream differ from the host's by microseconds
    return spans[(middle > start) & (middle < end)]


def _cover(spans: np.ndarray) -> _Cover:
    return _Cover(spans["start"], spans["end"])


def _waiting(spans: np.ndarray, attend: _Cover, rate: tuple[float, float] | None) -> float:
    """Seconds of transfers behind which nothing attends, and in which the bytes themselves would be long there."""
    open_s = spans["end"] - spans["start"] - attend.within(spans["start"], spans["end"])
    moves = spans["bytes"] > 0
    if rate is None:
        return float(open_s[~moves].sum())
    needed = np.where(moves, rate[0] + spans["bytes"] / rate[1], 0.0)
    return float(np.maximum(open_s - needed, 0.0).sum())

"""What was measured: timings fitted to the cost model, and costs kept for the next run on the same cluster."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..output import atomic
from .costs import Costs

TILES = (1, 16, 32, 64, 128, 256)


def fit(times: Mapping[int, float], operations: int) -> tuple[float, int]:
    """(operations a second, tile) for calls of `operations` operations a query that take `times`, by their queries."""
    best = math.inf, 0.0, 1
    for tile in TILES:
        work = {q: -(-q // tile) * min(tile, q) * operations for q in times}
        rate = math.exp(sum(math.log(work[q] / s) for q, s in times.items()) / len(times))
        error = sum(math.log(work[q] / rate / s) ** 2 for q, s in times.items())
        if error < best[0] * 0.7:  # a larger tile must explain more than chance would
            best = error, rate, tile
    return best[1], best[2]


def kept_at(key: Mapping[str, Any]) -> Path:
    """The file for costs of the cluster that `key`, of JSON's types, tells from all others."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "hpcdit" / f"costs-{digest}.json"


def read(path: Path) -> dict[str, Any] | None:
    """Costs.to_dict of what was kept, if it is whole."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        costs = Costs.from_dict(json.loads(path.read_text()))
        if all(type(n) is bool or (type(n) in (int, float) and 0 < n < math.inf) for n in _numbers(asdict(costs))):
            return costs.to_dict()
    return None


def write(path: Path, costs: Mapping[str, Any]) -> None:
    """Keeps costs if it can."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, json.dumps(costs, indent=1).encode(), replace=True)


def _numbers(values: Mapping[str, Any]) -> list[Any]:
    return [n for v in values.values() for n in (_numbers(v) if isinstance(v, Mapping) else [v])]

"""Why a plan was not chosen, and what would help where none fits; in words."""

from dataclasses import replace

from ..errors import InputError
from .costs import Costs
from .groups import divisors
from .plans import Plan
from .workload import Workload

MOST_RANKS = 1 << 20


def seconds(value: float) -> str:
    """A duration in three digits."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    if value < 999.5:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(nbytes: float) -> str:
    """A number of bytes in three digits."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def idle(plan: Plan) -> str:
    """How much of the ranks' time no video has."""
    if plan.idle > 0.995:
        return f"of {plan.replicas} replicas hardly one has a video"
    return f"{plan.idle:.0%} of the ranks' time without a video"


def why_not(plan: Plan, best: Plan, memory_bytes: float) -> str:
    """What costs `plan` more of the ranks' time than `best`: no video, waiting, or computing."""
    if plan.memory_bytes > memory_bytes:
        return f"needs {size(plan.memory_bytes)} of memory, a rank has {size(memory_bytes)}"
    if plan.makespan_s <= best.makespan_s * 1.02:
        return "no faster by more than 2 %, and less simple" if plan.makespan_s < best.makespan_s else "nearly as fast"

    def parts(p: Plan) -> dict[str, float]:
        busy = p.makespan_s * (1 - p.idle) / p.step_s
        return {"idle": p.makespan_s * p.idle, "wait": busy * p.exposed_s, "compute": busy * p.compute_s}

    mine, theirs = parts(plan), parts(best)
    if plan.idle <= best.idle:
        del mine["idle"]
    worst = max(mine, key=lambda part: mine[part] - theirs[part])
    if worst == "idle":
        return f"{idle(plan)} (chosen: {best.idle:.0%})"
    if worst == "wait":
        across = size(plan.inter_bytes) + " cross nodes" if plan.inter_bytes else size(plan.intra_bytes) + " move"
        return f"waits {seconds(plan.exposed_s)} a step ({across}; chosen waits {seconds(best.exposed_s)})"
    return f"computes {mine['compute'] / theirs['compute']:.2f}x as long: calls too small, or cut unevenly"


def too_large(work: Workload, costs: Costs, ranks: int, least: int) -> InputError:
    """The error for a batch of which no layout fits: at best `least` bytes a rank, with `ranks` ranks for a video."""
    memory = costs.memory_bytes
    helps = []
    more = next((n for n in _doubled(ranks) if _leanest(work, n) <= memory), None)
    if more is not None:
        helps.append(f"{more} ranks")
    share = next((p for p in (75, 50, 25, 10) if _leanest(_shorter(work, p), ranks) <= memory), None)
    if share is not None:
        helps.append(f"fewer frames or pixels ({share} % of the {work.tokens} tokens would fit)")
    if work.itemsize > 2 and _leanest(replace(work, itemsize=2), ranks) <= memory:
        helps.append("model.dtype=bfloat16")
    if work.shelves == 1 and _leanest(replace(work, shelves=0), ranks) <= memory:
        helps.append("model.layers=host, or sharded over a node's ranks")
    if not helps:
        helps.append("ranks with more memory, or a smaller model")
    weights = f", {size(work.weights_bytes)} of them weights"
    return InputError(
        f"cluster.costs.memory_gb={memory / 1e9:.4g}: no layout fits, the leanest takes {least / 1e9:.4g} GB on a rank"
        f"{weights}; allowed: {' or '.join(helps)}"
    )


def _leanest(work: Workload, ranks: int) -> int:
    degrees = [d for d in divisors(ranks) if d <= work.heads]
    return min(work.memory_bytes(d, ranks // d, stored=True) for d in degrees)


def _shorter(work: Workload, percent: int) -> Workload:
    return replace(work, tokens=max(work.tokens * percent // 100, 1))


def _doubled(ranks: int) -> list[int]:
    found = [ranks * 2]
    while found[-1] < min(MOST_RANKS, ranks << 12):
        found.append(found[-1] * 2)
    return found

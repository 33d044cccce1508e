"""A plan in text: the plans as a table, and what ranks do in one attention layer as a lane diagram."""

from collections.abc import Sequence

from .plans import Plan
from .reasons import seconds, size
from .timeline import Span

WIDTH = 120
ROWS = 8  # ranks that are drawn

# What a rank does at a time: whether it attends, and whether its data is on its way to another node.
MARKS = {(True, True): "#", (True, False): "=", (False, True): "~"}
LEGEND = "= attends  # attends while its data goes to other nodes  ~ that alone  - moves data inside its node  . waits"


def table(best: Plan) -> str:
    """The chosen plan and those that were not, a line each, and why."""
    rows = [("", "plan", "a step", "batch", "across nodes", "memory", "why not")]
    for plan in (best, *best.others):
        rows.append(
            (
                ">" if plan is best else "",
                str(plan),
                seconds(plan.step_s),
                seconds(plan.makespan_s),
                size(plan.inter_bytes) if plan.inter_bytes else "-",
                size(plan.memory_bytes),
                plan.why,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(1), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in range(2, 6))]
        lines.append(" ".join(cells[:2]) + "  " + "  ".join(cells[2:]))
        if len(lines[-1]) + 2 + len(row[6]) <= WIDTH:
            lines[-1] += "  " * bool(row[6]) + row[6]
        else:
            lines.append(f"      {row[6]}")
    return "\n".join(line.rstrip() for line in lines)


def lanes(spans: Sequence[Span], whole_s: float, nodes: Sequence[int]) -> str:
    """A row a rank over the `whole_s` seconds of one layer: what it does most of in each column."""
    ranks = sorted({span.rank for span in spans})
    label = len(_label(ranks, nodes)) + 2
    columns = WIDTH - label - 3
    alike: dict[str, list[int]] = {}
    for rank in ranks:
        alike.setdefault(_row(spans, rank, whole_s, columns), []).append(rank)
    shown = list(alike.items())[:: max(-(-len(alike) // ROWS), 1)]
    lines = [f"{_label(who, nodes).ljust(label)} |{row}|" for row, who in shown]
    ruler = f"{'0'.rjust(label + 2)}{seconds(whole_s).rjust(columns)}"
    return "\n".join([*lines, ruler, LEGEND])


def _label(ranks: Sequence[int], nodes: Sequence[int]) -> str:
    """The first of the ranks, which do the same, and how many others there are."""
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"node {nodes[ranks[0]]} rank {ranks[0]}{more}"


def _row(spans: Sequence[Span], rank: int, whole_s: float, columns: int) -> str:
    busy = {lane: [0.0] * columns for lane in ("compute", "inter", "intra")}
    for span in spans:
        if span.rank == rank:
            _fill(busy[span.lane], span.start / whole_s * columns, span.end / whole_s * columns)
    marks = []
    for compute, inter, intra in zip(*busy.values(), strict=True):
        mark = MARKS.get((compute >= 0.5, inter >= 0.5))
        marks.append(mark or ("-" if intra >= 0.5 else "=" if compute > 0.25 else "."))
    return "".join(marks)


def _fill(cells: list[float], start: float, end: float) -> None:
    """Adds to each cell the part of it that lies between `start` and `end`."""
    for cell in range(int(start), min(int(end) + 1, len(cells))):
        cells[cell] += max(min(end, cell + 1) - max(start, cell), 0.0)

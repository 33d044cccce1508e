"""Which method and which degrees a run uses: all legal layouts of a group, ranked.

Ranked by what can be counted from the schedules themselves: how evenly they share the work, then the elements that
cross nodes while nothing hides them, then all elements that cross nodes, then those that stay inside, then the number
of attention calls.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..attention.methods import METHODS, degrees, schedule
from ..attention.schedule import Attend, Schedule, Shape, traffic
from ..mesh import cut


@dataclass(frozen=True)
class Plan:
    """How a group of ranks shares one attention layer, and what that costs.

    imbalance: the work of the busiest rank / the mean, 1 is even. inter, intra: elements of one layer that cross
    nodes or stay inside, all ranks together; exposed: those of `inter` that no computation hides; calls: of the
    attention kernel, on one rank.
    """

    method: str
    ulysses: int
    ring: int
    imbalance: float
    exposed: int
    inter: int
    intra: int
    calls: int

    def schedule(self) -> Schedule:
        return schedule(self.method, self.ulysses, self.ring)

    def rank_by(self) -> tuple[int, ...]:
        """What decides between plans, the smaller the better. Imbalance counts in steps of 5 %."""
        return round(self.imbalance * 20), self.exposed, self.inter, self.intra, self.calls

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.method} {self.ulysses} x {self.ring}"


def search(
    shape: Shape,
    nodes: Sequence[int],
    method: str = "auto",
    ulysses: int | None = None,
    ring: int | None = None,
) -> list[Plan]:
    """All plans for one group on ranks that lie on `nodes`, the best first; those that the arguments fix stay fixed.

    Raises InputError where no layout is legal, naming the key.
    """
    ranks = len(nodes)
    if method != "auto":
        free = ulysses is None and ring is None and method not in ("ulysses", "ring")
        pairs = _pairs(ranks, shape.heads) if free else [degrees(method, ranks, shape.heads, ulysses, ring)]
        return sorted((price(method, *pair, shape, nodes) for pair in pairs), key=Plan.rank_by)
    given = ulysses is not None or ring is not None
    pairs = [degrees("torus", ranks, shape.heads, ulysses, ring)] if given else _pairs(ranks, shape.heads)
    # On a mesh of one axis the products are Ulysses or Ring by another name.
    named = [("ulysses", u, r) if r == 1 else ("ring", u, r) for u, r in pairs if 1 in (u, r)]
    both = [(name, u, r) for name in ("usp", "tas") for u, r in pairs if 1 not in (u, r)]
    torus = [("torus", u, r) for u, r in pairs if len(set(nodes)) > 1 and u > 1]
    return sorted((price(*layout, shape, nodes) for layout in named + both + torus), key=Plan.rank_by)


def price(method: str, ulysses: int, ring: int, shape: Shape, nodes: Sequence[int]) -> Plan:
    """Counts what `method` on ulysses x ring ranks costs."""
    layout = schedule(method, ulysses, ring)
    moved = traffic(layout, shape, nodes)
    tokens, slots = cut(shape.length, len(nodes)), layout.heads(shape.heads)
    work = [
        len(slots[layout.own(rank)[0]])
        * sum(len(tokens[q]) * len(tokens[kv]) for s in steps if isinstance(s, Attend) for q in s.q for kv in s.kv)
        for rank, steps in enumerate(layout.ranks)
    ]
    mean = sum(work) / len(work)
    hidden = METHODS[method][0].__name__ == "torus"
    return Plan(
        method=method,
        ulysses=ulysses,
        ring=ring,
        imbalance=max(work) / mean if mean else 1.0,
        exposed=0 if hidden else moved["inter"],
        inter=moved["inter"],
        intra=moved["intra"],
        calls=sum(isinstance(step, Attend) for step in layout.ranks[0]),
    )


def _pairs(ranks: int, heads: int) -> list[tuple[int, int]]:
    return [(d, ranks // d) for d in range(1, min(ranks, heads) + 1) if ranks % d == 0]


def table(plans: Sequence[Plan], shape: Shape, itemsize: int, layers: int) -> str:
    """The plans as text, the chosen one first, bytes of one pass through the model."""
    head = "  method   ulysses x ring busiest/mean  across nodes   exposed    inside"
    rows = [
        f"sequence of {shape.length} tokens, {shape.heads} heads of {shape.dim}; MB of one pass, {layers} layers",
        head,
    ]
    for n, plan in enumerate(plans):
        mb = [f"{x * itemsize * layers / 1e6:.1f}" for x in (plan.inter, plan.exposed, plan.intra)]
        rows.append(
            f"{'>' if n == 0 else ' ':2}{plan.method:8} {f'{plan.ulysses} x {plan.ring}':>14} {plan.imbalance:>12.2f}"
            f" {mb[0]:>13} {mb[1]:>9} {mb[2]:>9}"
        )
    return "\n".join(rows)

"""How the ranks of a run are cut into groups that render a video, or half of its guidance, together."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..errors import InputError
from .costs import Costs, Link


@dataclass(frozen=True)
class Fixed:
    """What the user decided; None, or auto: the planner chooses."""

    method: str = "auto"
    replicas: int | None = None
    cfg: int | None = None
    ulysses: int | None = None
    ring: int | None = None
    pieces: int | None = None
    groups: int | None = None


@dataclass(frozen=True)
class Group:
    """One of `replicas` x `cfg` groups of ranks, the one that is spread over most nodes.

    nodes: of its ranks, counted from 0; share: groups that send through one node's link at the same time;
    apart: whether the halves of a guided step lie on different nodes.
    """

    replicas: int
    cfg: int
    nodes: tuple[int, ...]
    share: int
    apart: bool

    @property
    def size(self) -> int:
        return len(self.nodes)

    @cached_property
    def here(self) -> int:
        """Its ranks on its first node."""
        return self.nodes.count(self.nodes[0])

    @property
    def crosses(self) -> bool:
        """Whether it lies on several nodes."""
        return self.nodes[-1] > 0

    def costs(self, costs: Costs) -> Costs:
        """What links cost while the other groups use them too."""
        if self.share == 1:
            return costs
        return replace(costs, inter=Link(costs.inter.latency_s, costs.inter.bytes_per_s / self.share))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def groupings(nodes: Sequence[int], guided: bool, fixed: Fixed) -> list[Group]:
    """All ways to cut ranks on `nodes` into equal groups of neighbours. Raises InputError where the user's has none."""
    ranks = len(nodes)
    if fixed.cfg == 2 and not guided:
        raise InputError("parallel.cfg=2: without guidance there are no two halves; allowed: 1, or null")
    found = []
    for size in divisors(ranks):
        for cfg in (1, 2) if guided and fixed.cfg is None else (fixed.cfg or 1,):
            if ranks // size % cfg == 0 and fixed.replicas in (None, ranks // size // cfg):
                found.append(_group(nodes, size, cfg))
    if not found:
        given = [f"parallel.{key}={value}" for key in ("replicas", "cfg") if (value := getattr(fixed, key)) is not None]
        most = ranks // (fixed.cfg or 1) if ranks % (fixed.cfg or 1) == 0 else ranks
        raise InputError(
            f"{' '.join(given)}: groups of equal size are needed from {ranks} rank{'s' * (ranks != 1)};"
            f" allowed: replicas x cfg that divides {ranks}, as {', '.join(map(str, divisors(most)[:12]))}"
        )
    return found


def _group(nodes: Sequence[int], size: int, cfg: int) -> Group:
    patterns, crossing = set(), Counter[int]()
    for first in range(0, len(nodes), size):
        mine = nodes[first : first + size]
        if mine[0] != mine[-1]:
            crossing.update(set(mine))
        start = mine[0]
        patterns.add(tuple(node - start for node in mine))
    widest = max(patterns, key=lambda pattern: (pattern[-1], pattern))
    pairs = range(0, len(nodes) - size, cfg * size)
    apart = cfg > 1 and any(nodes[first + i] != nodes[first + size + i] for first in pairs for i in (0, size - 1))
    return Group(len(nodes) // size // cfg, cfg, widest, max(crossing.values(), default=1), apart)

"""Which layout renders a batch soonest: all legal ones, bounded from below, the promising ones simulated.

The batch is cut over `replicas` groups of ranks, guided steps perhaps over `cfg` halves of a group, the attention of
each by one of the methods. What counts is the makespan of the whole batch, under the memory of a rank.
"""

from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush

from ..errors import InputError
from .costs import Costs
from .groups import Fixed, Group, groupings
from .plans import Plan
from .price import Candidate, Pricer, rounds_of, step_s
from .reasons import too_large, why_not
from .space import Bound, bound, layouts
from .workload import Workload

NEAR = 1.003  # what is so near to the best is as good: layouts are left unsimulated, simpler ones preferred, each once
NEARLY = 1.05  # the same, for plans that are only to be told of
RIVALS = 5  # runners-up that are told of


def plan_batch(work: Workload, nodes: Sequence[int], costs: Costs, fixed: Fixed | None = None) -> Plan:
    """The plan that renders the batch soonest on ranks that lie on `nodes`.

    What `fixed` gives stays as it is. The same arguments give the same plan on every rank.
    Raises InputError where no layout is legal, or none fits into memory: one line that says what would.
    """
    fixed = fixed or Fixed()
    found, refused = list[Candidate](), list[InputError]()
    for group in groupings(nodes, work.guided, fixed):
        try:
            found += _candidates(group, work, costs, fixed)
        except InputError as error:  # degrees that do not fit this group may fit another
            refused.append(error)
    if not found:
        raise refused[-1]  # of the largest group, which is what the user has in mind
    return _best(found, work, costs)


def plan_group(work: Workload, nodes: Sequence[int], costs: Costs, fixed: Fixed | None = None, share: int = 1) -> Plan:
    """The plan for one group whose ranks lie on `nodes`: replicas and cfg are decided, the shape is another.

    fixed.replicas, fixed.cfg: those of the run; share: groups that use a node's link at the same time.
    """
    fixed = fixed or Fixed()
    group = Group(fixed.replicas or 1, fixed.cfg or 1, tuple(node - nodes[0] for node in nodes), share, apart=True)
    return _best(_candidates(group, work, costs, fixed), work, costs)


def _candidates(group: Group, work: Workload, costs: Costs, fixed: Fixed) -> list[Candidate]:
    bounds: dict[tuple[str, int, int], Bound] = {}
    found = []
    for layout in layouts(group, work.heads, fixed, costs.puts):
        family = (layout.method, layout.ulysses, layout.ring)
        if family not in bounds:
            bounds[family] = bound(*family, group, work, costs)
        limit = bounds[family]
        least = rounds_of(group, work) * step_s(group, work, costs, limit.seconds)
        memory = work.memory_bytes(layout.ulysses, layout.ring, limit.stored)
        found.append(Candidate(group, layout, limit, least, memory))
    return found


def _best(found: list[Candidate], work: Workload, costs: Costs) -> Plan:
    """Simulates candidates from the lowest bound on, until no other can be better; returns the best with its rivals."""
    fitting = sorted((c for c in found if c.memory <= costs.memory_bytes), key=Candidate.order)
    if not fitting:
        leanest = min(found, key=lambda c: c.memory)
        raise too_large(work, costs, max(c.group.size for c in found), leanest.memory)
    price = Pricer(work, costs)
    priced = _explore(fitting, price)
    soonest = min(plan.makespan_s for plan, _ in priced)
    near = [pair for pair in priced if pair[0].makespan_s <= soonest * NEAR]
    best, chosen = min(near, key=lambda pair: (pair[0].idle, *pair[1].tie()))
    for method in {c.layout.method: c for c in fitting}:  # the best of each, however far behind
        if method != chosen.layout.method:
            priced += _explore([c for c in fitting if c.layout.method == method], price, NEARLY)
    rivals = dict[tuple[int, int, str], Plan]()
    for plan, candidate in sorted(priced, key=lambda pair: (pair[0].makespan_s, *pair[1].tie())):
        first_of_method = candidate.layout.method not in {method for _, _, method in rivals}
        if candidate.kind() != chosen.kind() and (first_of_method or len(rivals) < RIVALS):
            rivals.setdefault(candidate.kind(), plan)
    larger = [c for c in found if c.memory > costs.memory_bytes and c.least < best.makespan_s]
    others = [price(min(larger)), *rivals.values()] if larger else list(rivals.values())
    return replace(best, others=tuple(replace(p, why=why_not(p, best, costs.memory_bytes)) for p in others))


def _explore(candidates: list[Candidate], price: Pricer, near: float = NEAR) -> list[tuple[Plan, Candidate]]:
    """Simulates sorted candidates from the lowest bound on, until no other can be better by more than `near` says.

    What is too large to be simulated is only estimated, and only where there is nothing else.
    """
    waiting, priced, large = candidates.copy(), list[tuple[Plan, Candidate]](), list[Candidate]()
    soonest = float("inf")
    while waiting and waiting[0].least * near <= soonest:
        candidate = heappop(waiting)
        if not price.affords(candidate) and not price.knows(candidate):
            large.append(candidate)
        elif not candidate.close:
            heappush(waiting, price.closer(candidate))
        else:
            priced.append((price(candidate), candidate))
            soonest = min(soonest, priced[-1][0].makespan_s)
    return priced or [(price(large[0]), large[0])]


def legal(work: Workload, nodes: Sequence[int], fixed: Fixed) -> None:
    """Raises InputError where what `fixed` gives makes no legal layout, as plan_batch would; prices nothing."""
    refused = list[InputError]()
    for group in groupings(nodes, work.guided, fixed):
        try:
            layouts(group, work.heads, fixed)
            return
        except InputError as error:
            refused.append(error)
    raise refused[-1]

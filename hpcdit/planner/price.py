"""What a candidate plan costs: a step and the batch, from the time of one attention layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm, log
from typing import Any

from ..attention.methods import METHODS, Layout
from ..attention.schedule import Shape
from .costs import Costs
from .groups import Fixed, Group, groupings
from .plans import Plan
from .simulate import simulate
from .space import Bound, alone, bound, simplicity
from .timeline import Timeline
from .workload import Workload

UNEVEN = 8  # ranks of a group up to which uneven shares are simulated as they are
BUDGET = 30_000  # steps of simulated ranks in one search: about a second; only hundreds of ranks a video come near it


@dataclass(frozen=True)
class Candidate:
    """A plan that is not simulated yet. least: seconds that its batch takes at least; close: that is known well."""

    group: Group
    layout: Layout
    bound: Bound
    least: float
    memory: int
    close: bool = False

    def order(self) -> tuple[Any, ...]:
        """The quickest first; of those that differ by less than a few thousandths, the simplest."""
        return (round(log(self.least) * 300), *self.tie())

    def __lt__(self, other: "Candidate") -> bool:
        return self.order() < other.order()

    def tie(self) -> tuple[Any, ...]:
        """Decides between equals, the same on every rank."""
        return (*simplicity(self.layout), self.group.cfg, self.group.replicas)

    def kind(self) -> tuple[int, int, str]:
        return self.group.replicas, self.group.cfg, self.layout.method

    @property
    def steps(self) -> int:
        """About as many steps have the ranks that are simulated for this one."""
        layout, here = self.layout, self.group.here
        inner = layout.ulysses if METHODS[layout.method][1][0] == "ring" else layout.ring
        few = min(self.group.size, lcm(here, inner))
        return few * (2 * self.group.size * layout.groups + 8)


def rounds_of(group: Group, work: Workload) -> int:
    """Steps that one group makes, one after the other."""
    return ceil(work.videos / (group.replicas * work.batch)) * work.steps


def step_s(group: Group, work: Workload, costs: Costs, attention: float) -> float:
    """Seconds of one denoising step, with `attention` seconds a layer."""
    layers = work.layers * (attention + work.rest_s(group.size, costs))
    passes = 2 if work.guided and group.cfg == 1 else 1
    return passes * (layers + _gather(group, work, costs)) + _exchange(group, work, costs)


def _gather(group: Group, work: Workload, costs: Costs) -> float:
    """Seconds until every rank has all tokens at the end of a pass."""
    if group.size == 1:
        return 0.0
    missing = work.gather_bytes() * (group.size - group.here) / group.size
    far = costs.inter.latency_s + group.here * missing / group.costs(costs).inter.bytes_per_s if group.crosses else 0.0
    return max(far, costs.intra.latency_s + (work.gather_bytes() - missing) / costs.intra.bytes_per_s)


def _exchange(group: Group, work: Workload, costs: Costs) -> float:
    """Seconds in which the halves of a guided step exchange their noise predictions, each rank with its twin."""
    if group.cfg == 1:
        return 0.0
    if not group.apart:
        return costs.intra.latency_s + work.exchange_bytes() / costs.intra.bytes_per_s
    return costs.inter.latency_s + group.here * work.exchange_bytes() / costs.inter.bytes_per_s


class Pricer:
    """Prices candidates: by a simulation, each layout of a group once; where that is too long, by one rank's steps."""

    def __init__(self, work: Workload, costs: Costs) -> None:
        self.work, self.costs, self.steps = work, costs, 0
        self._alone, self._simulated = dict[tuple, Timeline](), dict[tuple, Timeline]()

    def __call__(self, candidate: Candidate) -> Plan:
        work, group = self.work, candidate.group
        timeline = self.timeline(candidate)
        passes = 2 if work.guided and group.cfg == 1 else 1
        step = step_s(group, work, self.costs, timeline.seconds)
        compute = passes * work.layers * (timeline.compute_s + work.rest_s(group.size, self.costs))
        moved = (2 if work.guided else 1) * work.layers
        rounds = rounds_of(group, work)
        return Plan(
            replicas=group.replicas,
            cfg=group.cfg,
            layout=candidate.layout,
            step_s=step,
            makespan_s=rounds * step,
            compute_s=compute,
            exposed_s=max(step - compute, 0.0),
            inter_bytes=moved * timeline.inter_bytes,
            intra_bytes=moved * timeline.intra_bytes,
            memory_bytes=candidate.memory,
            idle=1 - work.videos * work.steps / (group.replicas * work.batch * rounds),
        )

    def affords(self, candidate: Candidate) -> bool:
        """Whether there is time to simulate it; counted in steps, so that all ranks say the same."""
        return self.steps + candidate.steps <= BUDGET

    def knows(self, candidate: Candidate) -> bool:
        return (candidate.layout, candidate.group.nodes, candidate.group.share) in self._simulated

    def closer(self, candidate: Candidate) -> Candidate:
        """The candidate with a bound that takes its pieces and head groups into account."""
        layer = self._estimate(candidate).seconds
        least = rounds_of(candidate.group, self.work) * step_s(candidate.group, self.work, self.costs, layer)
        return replace(candidate, least=max(least, candidate.least), close=True)

    def _estimate(self, candidate: Candidate) -> Timeline:
        group, layout, work = candidate.group, candidate.layout, self.work
        key = (layout, group.nodes, group.share)
        if key not in self._alone:
            self._alone[key] = alone(layout, self.shape(candidate), group, self.costs, work.itemsize, candidate.bound)
        return self._alone[key]

    def shape(self, candidate: Candidate) -> Shape:
        """The layer's shape; in large groups all shares are as large as the largest: few ranks stand for all."""
        work, ranks, ulysses = self.work, candidate.group.size, candidate.layout.ulysses
        length, heads = work.tokens, work.heads
        if ranks > UNEVEN:
            length, heads = ceil(length / ranks) * ranks, ceil(heads / ulysses) * ulysses
        return Shape(work.batch, length, heads, work.head_dim)

    def timeline(self, candidate: Candidate) -> Timeline:
        group, layout = candidate.group, candidate.layout
        key = (layout, group.nodes, group.share)
        if key not in self._simulated:
            if not self.affords(candidate):
                return self._estimate(candidate)
            self.steps += candidate.steps
            shape, costs = self.shape(candidate), group.costs(self.costs)
            self._simulated[key] = simulate(layout.schedule(), shape, group.nodes, costs, self.work.itemsize)
        return self._simulated[key]


def timeline(plan: Plan, work: Workload, costs: Costs, nodes: Sequence[int]) -> tuple[Group, Timeline]:
    """One attention layer of `plan`, as it was priced, and the group of ranks that computes it."""
    fixed = Fixed(replicas=plan.replicas, cfg=plan.cfg)
    group = groupings(nodes, work.guided, fixed)[0]
    limit = bound(plan.method, plan.ulysses, plan.ring, group, work, costs)
    return group, Pricer(work, costs).timeline(Candidate(group, plan.layout, limit, 0.0, plan.memory_bytes))

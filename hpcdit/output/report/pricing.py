"""What the planner says of a video that was rendered: the prediction, and which override would reduce which tax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...attention.methods import Layout
from ...errors import InputError
from ...planner.costs import Costs
from ...planner.groups import Fixed, divisors, groupings
from ...planner.plans import Plan
from ...planner.presets import to_costs
from ...planner.price import Candidate, Pricer
from ...planner.search import plan_batch
from ...planner.space import bound
from ...planner.timeline import Timeline
from ...planner.workload import PASSES, Workload

WORTH = 0.01  # the share of the batch's time that an override has to save to be told of


@dataclass(frozen=True)
class Priced:
    """A video's plan with all that prices it. nodes: on which the ranks of the run lie, all of them."""

    layout: Layout
    fixed: Fixed
    work: Workload
    costs: Costs
    nodes: tuple[int, ...]

    @classmethod
    def of(cls, plan: Mapping[str, Any], sampling: Mapping[str, Any]) -> "Priced | None":
        """From what is stored with a video; None where that is of an earlier version, or damaged."""
        try:
            priced = plan["priced"]
            layout = Layout(**{field.name: plan[field.name] for field in fields(Layout)})
            work = Workload(**priced["work"])
            work = replace(work, tokens=plan["tokens"], batch=plan["batch"], steps=sampling["steps"])
            fixed = Fixed(layout.method, plan["replicas"], plan["cfg"], layout.ulysses, layout.ring)
            fixed = replace(fixed, pieces=layout.pieces, groups=layout.groups)
            return cls(layout, fixed, work, to_costs(priced["costs"]), tuple(priced["nodes"]))
        except (LookupError, TypeError, ValueError):
            return None

    def best(self, fixed: Fixed, work: Workload | None = None) -> Plan | None:
        """The best plan within `fixed`; None where there is none."""
        try:
            return plan_batch(work or self.work, self.nodes, self.costs, fixed)
        except InputError:
            return None

    def layer(self) -> Timeline:
        """One attention layer, as the planner's simulator has it."""
        group = groupings(self.nodes, self.work.guided, Fixed(replicas=self.fixed.replicas, cfg=self.fixed.cfg))[0]
        limit = bound(self.layout.method, self.layout.ulysses, self.layout.ring, group, self.work, self.costs)
        return Pricer(self.work, self.costs).timeline(Candidate(group, self.layout, limit, 0.0, 0))

    def moved(self, plan: Plan) -> tuple[float, float]:
        """Bytes of a step of `plan` that cross nodes, and that move inside them: attention, and halves of guidance."""
        both = 0
        group = groupings(self.nodes, self.work.guided, Fixed(replicas=plan.replicas, cfg=plan.cfg))[0]
        if plan.cfg > 1:
            both = plan.cfg * group.size * self.work.exchange_bytes()
        return plan.inter_bytes + both * group.apart, plan.intra_bytes + both * (not group.apart)

    def traffic_s(self) -> float:
        """Rank-seconds of a video in which activations leave the chip and come back between kernels, from bytes."""
        work = self.work
        nbytes = PASSES * work.tokens * work.width * work.itemsize * work.layers * work.steps
        return self.costs.copy(nbytes) * (2 if work.guided else 1)

    def calls_s(self, calls: int) -> float:
        """Seconds that so many attention calls cost beyond what they compute."""
        return calls * self.costs.call_s


@dataclass(frozen=True)
class Advice:
    """override: words of a command line, empty where none helps; before_s, after_s: the batch, by the planner; why."""

    override: str
    before_s: float
    after_s: float
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def advise(priced: Priced, dtype: str) -> dict[str, Advice]:
    """For each tax the override that would reduce it most in the planner's eyes: sync, traffic, launch, inter, intra.

    dtype: of the model, as torch names it.
    """
    now = priced.best(priced.fixed)
    if now is None:
        return {}
    layouts = [(f"parallel.replicas={n}", Fixed(replicas=n)) for n in divisors(len(priced.nodes))]
    layouts += [(f"parallel.cfg={n}", Fixed(cfg=n)) for n in (1, 2)]
    layouts += [(f"parallel.method={m}", Fixed(m)) for m in ("ulysses", "ring", "usp", "tas", "torus")]
    plans = [(words, plan) for words, fixed in layouts if (plan := priced.best(fixed))]
    twice = _doubled(priced)
    smaller = _halved(priced, dtype)
    return {
        "sync": _least(now, plans, lambda plan: plan.exposed_s * _ranks(plan), "waits less"),
        "inter": _least(now, plans, lambda plan: priced.moved(plan)[0], "sends less between nodes"),
        "intra": _least(now, plans, lambda plan: priced.moved(plan)[1], "moves less inside nodes"),
        "traffic": _least(now, smaller, lambda plan: plan.compute_s, "moves less between kernels"),
        "launch": _least(now, twice, lambda plan: 0.0, ""),
        "imbalance": _least(now, plans, _ranks, "has fewer ranks a video"),
    }


def _ranks(plan: Plan) -> int:
    """Ranks that render a video together."""
    return plan.cfg * plan.layout.ulysses * plan.layout.ring


def _least(now: Plan, plans: Sequence[tuple[str, Plan]], tax: Callable[[Plan], float], what: str) -> Advice:
    """Of the plans that take less of `tax` than `now`, the one whose batch ends soonest, if that is worth it.

    tax: of a step of a video, all its ranks together; what: such plans do; "": whatever they do.
    """
    less = [(words, plan) for words, plan in plans if tax(plan) < tax(now) or not what]
    found = min(less, key=lambda pair: pair[1].makespan_s, default=None)
    if found is None:
        why = f"no plan {what} than {now}" if plans else "the planner knows nothing that would"
        return Advice("", now.makespan_s, now.makespan_s, why)
    words, plan = found
    if plan.makespan_s > now.makespan_s * (1 - WORTH):
        gain = "no faster" if plan.makespan_s >= now.makespan_s else f"less than {WORTH:.0%} faster"
        why = f"the best that {what}, {words}, is {gain}" if what else f"{words} is {gain}"
        return Advice("", now.makespan_s, plan.makespan_s, why)
    return Advice(words, now.makespan_s, plan.makespan_s, str(plan))


def _doubled(priced: Priced) -> list[tuple[str, Plan]]:
    batch = 2 * priced.work.batch
    plan = priced.best(priced.fixed, replace(priced.work, batch=batch))
    return [(f"parallel.batch={batch}", plan)] if plan else []


def _halved(priced: Priced, dtype: str) -> list[tuple[str, Plan]]:
    """Numbers of two bytes on GPUs: to the planner only what is moved gets quicker: that is the least that is won."""
    if dtype != "float32" or priced.costs.lanes == 1:  # many a CPU computes slower in them
        return []
    plan = priced.best(priced.fixed, replace(priced.work, itemsize=2))
    return [("model.dtype=bfloat16", plan)] if plan else []

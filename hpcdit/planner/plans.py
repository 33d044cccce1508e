"""A plan: how a batch is shared out among ranks, what that costs, and what else was thought of."""

from dataclasses import dataclass
from typing import Any

from ..attention.methods import Layout
from ..attention.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """A layout of the batch and what it costs.

    replicas: groups that render videos of their own; cfg: groups that share a guided step; layout: of the attention in
    a group. step_s: one denoising step; makespan_s: all steps of all videos. compute_s, exposed_s: of a step, what the
    busiest rank computes and how long it waits for transfers; inter_bytes, intra_bytes: of a step of one video, all
    ranks; memory_bytes: of the busiest rank; idle: the share of the ranks' time in which they have no video.
    why: it was not chosen. others: the runners-up and the best plans of the other methods.
    """

    replicas: int
    cfg: int
    layout: Layout
    step_s: float
    makespan_s: float
    compute_s: float
    exposed_s: float
    inter_bytes: float
    intra_bytes: float
    memory_bytes: int
    idle: float
    why: str = ""
    others: tuple["Plan", ...] = ()

    @property
    def method(self) -> str:
        return self.layout.method

    @property
    def ulysses(self) -> int:
        return self.layout.ulysses

    @property
    def ring(self) -> int:
        return self.layout.ring

    def schedule(self) -> Schedule:
        return self.layout.schedule()

    def describe(self) -> dict[str, Any]:
        """Of JSON's types: what is stored with each video."""
        layout = {key: getattr(self.layout, key) for key in ("method", "ulysses", "ring", "pieces", "groups")}
        keys = ("step_s", "makespan_s", "compute_s", "exposed_s", "inter_bytes", "intra_bytes", "memory_bytes", "idle")
        found = {"replicas": self.replicas, "cfg": self.cfg, **layout, **{key: getattr(self, key) for key in keys}}
        if self.others:
            found["others"] = [{"plan": str(p), "makespan_s": p.makespan_s, "why_not": p.why} for p in self.others]
        return found

    def __str__(self) -> str:
        axes = [f"{self.replicas} replicas"] * (self.replicas > 1) + ["cfg 2"] * (self.cfg > 1)
        return " x ".join([*axes, str(self.layout)])

"""The layouts of a run: of the whole batch before its ranks are cut into groups, then of each size of video."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..attention.schedule import Shape
from ..cluster import Cluster
from ..config import Config
from ..device import Device
from ..planner.calibrate import calibrate
from ..planner.costs import Costs
from ..planner.groups import groupings
from ..planner.plans import Plan
from ..planner.presets import overridden
from ..planner.search import plan_group
from ..planner.workload import Workload
from ..transport.base import Transport
from .plan import fixed, plan_fitting


class Planner:
    """Plans with what links and kernels cost on the machine at hand; the same on every rank.

    batch: how the run's ranks are cut into groups, and the layout of its largest video; work: all of it, with its text
    encoders on the host if need be.
    """

    def __init__(
        self, work: Workload, nodes: Sequence[int], costs: Costs, config: Config, devices: bool = False
    ) -> None:
        """nodes: of all ranks of the run; devices: whose memory is not the host's. Raises InputError where no layout
        is legal, or none fits into memory."""
        self.costs = costs
        self.batch, self.work = plan_fitting(work, nodes, costs, fixed(config.parallel), devices)
        self._fixed = replace(fixed(config.parallel), replicas=self.batch.replicas, cfg=self.batch.cfg)
        self._share = groupings(nodes, work.guided, self._fixed)[0].share
        self._plans: dict[tuple[Shape, tuple[int, ...], int | None], Plan] = {}

    @classmethod
    def measured(
        cls, config: Config, cluster: Cluster, transport: Transport, device: Device, work: Workload, head_dim: int
    ) -> "Planner":  # fmt: skip
        """transport: between all ranks. Collective over the cluster. Raises InputError on all ranks."""
        measured = calibrate(cluster, transport, device, getattr(torch, config.model.dtype), head_dim)
        costs = overridden(measured, config.cluster.costs)
        return cluster.world.together(lambda: cls(work, cluster.nodes, costs, config, device.cuda), "the plan")

    @property
    def memory_bytes(self) -> int:
        """What the plans until now have predicted of a rank, at most."""
        return max(plan.memory_bytes for plan in (self.batch, *self._plans.values()))

    def __call__(self, shape: Shape, nodes: Sequence[int], below: int | None = None) -> Plan:
        """The plan for layers of `shape` in a group whose ranks lie on `nodes`, worked out once.

        below: bytes that a rank has to stay below. Raises InputError where no layout fits into memory.
        """
        key = shape, tuple(nodes), below
        if key not in self._plans:
            work = replace(self.work, tokens=shape.length, batch=shape.batch)
            memory = self.costs.memory_bytes if below is None else min(self.costs.memory_bytes, below - 1)
            costs = replace(self.costs, memory_bytes=memory)
            plan = plan_group(work, nodes, costs, self._fixed, self._share)
            elsewhere = [p for p in self.batch.others if (p.replicas, p.cfg) != (plan.replicas, plan.cfg)]
            self._plans[key] = replace(plan, others=(*plan.others, *elsewhere))
        return self._plans[key]

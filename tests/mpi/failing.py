"""Runs in which one rank fails somewhere in a step: what is patched, on which rank, and what becomes of the videos."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hpcdit import app
from hpcdit.attention.executor import Attention
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import MPI, World
from hpcdit.models.families import wan_blocks
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.models.split import Split
from hpcdit.render.groups import Halves
from hpcdit.transport.rows import Line
from tests.mpi.groups import side_by_side

PLACES: dict[str, tuple[type, str]] = {
    "encode": (PipelineAdapter, "encode"),
    "layer": (wan_blocks.Attention, "__call__"),
    "publish": (SequenceParallel, "attend"),  # all is published, nothing attended
    "attend": (Attention, "_attend"),
    "gather": (Split, "_whole"),
    "swap": (Halves, "swap"),
    "scheduler": (FlowMatchEulerDiscreteScheduler, "step"),
    "decode": (PipelineAdapter, "decode"),
    "halo": (Line, "swap"),
}
SHORT = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")


@dataclass(frozen=True)
class Fault:
    """The `calls`-th call of what PLACES names raises `error`, `times` times in a row, on `rank`."""

    where: str
    calls: int
    rank: int
    error: Exception = field(default_factory=lambda: ZeroDivisionError("a bug"))
    times: int = 1

    @contextmanager
    def on(self, rank: int) -> Iterator[None]:
        owner, name = PLACES[self.where]
        original: Callable[..., Any] = getattr(owner, name)
        count = 0

        def fragile(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if rank == self.rank and self.calls <= count < self.calls + self.times:
                raise self.error
            return original(*args, **more)

        with mock.patch.object(owner, name, fragile):
            yield


@dataclass(frozen=True)
class Run:
    """A start of the program on 4 ranks, nodes of 2, with a fault."""

    fault: Fault
    method: str = "torus"
    cfg: int = 1
    batch: int = 1
    args: tuple[str, ...] = ()

    def name(self) -> str:
        fault = f"{type(self.fault.error).__name__} in {self.fault.where} {self.fault.calls} of rank {self.fault.rank}"
        return f"{self.method} cfg {self.cfg} batch {self.batch}, {fault} x {self.fault.times}"


# A pass has two layers; a guided step has two passes, or one with cfg 2; a video has two steps.
METHODS = [
    Run(Fault(where, calls, rank), method, cfg)
    for method, where, calls, rank, cfg in (
        ("ulysses", "layer", 2, 0, 1),
        ("ring", "attend", 7, 3, 1),
        ("usp", "publish", 3, 1, 1),
        ("tas", "attend", 2, 2, 2),
        ("torus", "attend", 4, 1, 1),
        ("torus", "gather", 3, 2, 1),
        ("torus", "swap", 2, 3, 2),
        ("ring", "layer", 4, 0, 2),
        ("torus", "scheduler", 1, 3, 2),
        ("torus", "scheduler", 2, 0, 1),  # the last of all
        ("torus", "encode", 1, 2, 1),
        ("torus", "decode", 1, 0, 1),
    )
]
MEMORY = [
    Run(Fault("layer", 3, 2, SHORT)),
    Run(Fault("layer", 3, 2, SHORT, times=2)),
    Run(Fault("layer", 3, 2, MemoryError(), times=1), batch=2),
    Run(Fault("decode", 1, 0, torch.OutOfMemoryError("no room"))),
]
ROWS = [
    Run(Fault(where, calls, rank, error), args=("parallel.vae=rows",))
    for where, calls, rank, error in (
        ("decode", 1, 1, ZeroDivisionError("a bug")),
        ("halo", 29, 2, ZeroDivisionError("a bug")),
        ("halo", 30, 3, SHORT),
    )
]
LIMIT = [Run(Fault("layer", 1, 1, times=99), args=("failures.max=2",))]


def renders(comm: MPI.Comm, checkpoint: str, prompts: str, folder: str, which: str) -> Any:
    """The runs of a list by the name `which`, each into a folder of its own: exit codes by name."""

    def body(run: Run) -> Callable[[World], int]:
        args = [f"model.path={checkpoint}", f"prompts={prompts}", f"output.dir={folder}/{run.name()}"]
        args += [f"parallel.method={run.method}", f"parallel.cfg={run.cfg}", f"parallel.batch={run.batch}"]
        args += ["parallel.replicas=1", "cluster.ranks_per_node=2", *run.args]

        def start(world: World) -> int:
            with run.fault.on(world.rank):
                return app.run(world, args)

        return start

    runs: list[Run] = globals()[which]
    codes = side_by_side(comm, [[(4, body(run))] for run in runs])
    return dict(zip([run.name() for run in runs], codes, strict=True))

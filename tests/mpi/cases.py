"""What the tests of this folder run under mpirun."""

import os
import signal
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from hpcdit import app
from hpcdit.attention.methods import schedule
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import MPI, Cluster, World
from hpcdit.kernels import cpu
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.transport.mpi import WIRES, MpiTransport
from tests.attention_cases import UNTIMED, Case
from tests.mpi.groups import each_size, side_by_side
from tools.bench.loading import measure

SIZE, SEED, STEPS, LENGTH = (9, 48, 80), 3, 2, 24
PROMPT, NEGATIVE = "a red circle moving left on the sea", "grey"


def transports(comm: MPI.Comm) -> Any:
    """Every method on 1 to 6 ranks as nodes of 1, 2 and 3, by turns by both ways between nodes.

    The largest error, and how many there were, by ranks.
    """

    def body(world: World) -> tuple[float, int]:
        worst, count = 0.0, 0
        for ranks_per_node in (1, 2, 3):
            nodes = Cluster(world, ranks_per_node)
            for at, (method, ulysses, ring) in enumerate(degrees(world.size)):
                case = Case(
                    method,
                    ulysses,
                    ring,
                    Shape(1, 61 - world.size, max(ulysses, 5), 6),
                    layers=4,
                    pause_s=0.002,
                    seed=count,
                    pieces=count % 2,
                    groups=1 + count % 3,
                )
                worst = max(worst, *case.run(MpiTransport(nodes, WIRES[(ranks_per_node + at) % 2])))
                count += 1
            nodes.close()
        return world.largest(worst, "the errors"), count

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def degrees(ranks: int) -> list[tuple[str, int, int]]:
    """Every method with every pair of degrees."""
    pairs = [(d, ranks // d) for d in range(1, ranks + 1) if ranks % d == 0]
    both = [(method, *pair) for method in ("usp", "tas", "torus") for pair in pairs]
    return [("ulysses", ranks, 1), ("ring", 1, ranks), *both]


def weights(comm: MPI.Comm, checkpoint: str, *how: str) -> Any:
    """Loads the checkpoint on all ranks, in each of some types and places ("float32 resident"): bytes of the weights,
    and bytes that the ranks hold together at most and in the end."""

    def body(world: World) -> list[tuple[int, int, int]]:
        folder = inspect(Path(checkpoint))
        found = [measure(world, folder, *words.split()) for words in how]
        return [(each.weights, each.most, each.left) for each in found if each]

    return side_by_side(comm, [[(comm.size, body)]])[0]


def program(comm: MPI.Comm, prompts: str, folder: str) -> Any:
    """The program on worlds of 1 to 6 ranks, two ranks a node, each into a folder of its own: exit codes by size."""

    def body(world: World) -> int:
        together = "parallel.replicas=1", "parallel.cfg=1", "cluster.ranks_per_node=2"
        args = [f"prompts={prompts}", f"output.dir={folder}/{world.size}", "sampling.num_frames=17", "sampling.steps=6"]
        return app.run(world, [*args, *together])

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def wan_frames(comm: MPI.Comm, checkpoint: str, reference: str) -> Any:
    """Renders the tiny checkpoint on 1 to 6 ranks, by every method and degree, with guidance and without.

    Each on nodes of 1, 2 or 3 by turns: every method on all of them is what `transports` shows.

    reference: an .npz with diffusers' own frames, `guided` and `unguided`. Returns by size the number of renders, and
    the largest difference from the reference in levels of 255.
    """
    folder, expected = inspect(Path(checkpoint)), np.load(reference)
    adapter = PipelineAdapter.load(folder)
    shape = Shape(1, adapter.shape.tokens(*SIZE), adapter.shape.heads, adapter.shape.head_dim)
    channels, noise = adapter.shape.token_channels, adapter.noise(SEED, *SIZE)
    torch.set_num_threads(1)

    def body(world: World) -> tuple[int, int]:
        count, worst = 0, 0
        possible = [degree for degree in degrees(world.size) if degree[1] <= shape.heads]
        for ranks_per_node in (1, 2, 3):
            nodes = Cluster(world, ranks_per_node)
            for method, ulysses, ring in possible[ranks_per_node - 1 :: 3]:
                guided = count % 2 == 0
                transport = MpiTransport(nodes, WIRES[count // 2 % 2])
                parallel = SequenceParallel(
                    schedule(method, ulysses, ring), shape, transport, cpu, torch.float32, UNTIMED, channels
                )
                conditions = adapter.encode(PROMPT, NEGATIVE, guided, LENGTH)
                latents = adapter.denoise(conditions, noise, STEPS, 4.0 if guided else 1.0, parallel, lambda *_: None)
                parallel.close()
                if count % world.size == world.rank:  # the decoding of each render is another rank's
                    frames = adapter.decode(latents).astype(int)
                    worst = max(worst, int(abs(frames - expected["guided" if guided else "unguided"]).max()))
                count += 1
            nodes.close()
        return count, int(world.largest(worst, "the differences"))

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


Layout = tuple[int, int, int, int]  # replicas, cfg, ranks a sequence, batch
# Each axis above 1, alone and with another one, and each batch with each axis.
LAYOUTS: list[list[Layout]] = [
    [(2, 1, 1, 2), (1, 2, 1, 3)],
    [(2, 1, 1, 3), (1, 2, 1, 2)],
    [(2, 2, 1, 1)],
    [(2, 2, 1, 3)],
    [(1, 2, 2, 2)],
    [(1, 2, 2, 1)],
    [(2, 1, 2, 1)],
    [(2, 1, 2, 2)],
    [(1, 1, 4, 3)],
    [(3, 1, 1, 3)],
]  # fmt: skip


def program_in_groups(comm: MPI.Comm, checkpoint: str, prompts: str, folder: str) -> Any:
    """The program on every layout of LAYOUTS, each into a folder of its own, nodes of 1, 2 and 3 ranks: exit codes."""

    def body(layout: Layout) -> Callable[[World], int]:
        replicas, cfg, _, batch = layout
        args = [f"model.path={checkpoint}", f"prompts={prompts}", f"output.dir={folder}/{name(layout)}"]
        args += [f"parallel.replicas={replicas}", f"parallel.cfg={cfg}", f"parallel.batch={batch}"]
        return lambda world: app.run(world, [*args, f"cluster.ranks_per_node={batch}"])

    rounds = [[(prod(layout[:3]), body(layout)) for layout in together] for together in LAYOUTS]
    codes = side_by_side(comm, rounds)
    return dict(zip([name(layout) for together in LAYOUTS for layout in together], codes, strict=True))


def name(layout: Layout) -> str:
    return "x".join(map(str, layout[:3])) + f", batch {layout[3]}"


def stop_in_a_group(comm: MPI.Comm, checkpoint: str, prompts: str, folder: str) -> Any:
    """Rank 3 of 2 x 1 x 2 ranks gets SIGTERM when all videos that can be under way are; the exit codes of all."""

    def body(world: World) -> list[int]:
        def signal_when_all_render() -> None:
            log, expected = Path(folder) / "run.log", min(2, len(Path(prompts).read_text().splitlines()))
            while not (log.exists() and log.read_text().count(": starts") >= expected):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        if world.rank == 3:
            threading.Thread(target=signal_when_all_render, daemon=True).start()
        args = [f"model.path={checkpoint}", f"prompts={prompts}", f"output.dir={folder}", "sampling.steps=1000"]
        code = app.run(world, [*args, "sampling.num_frames=5", "parallel.replicas=2", "parallel.cfg=1", "grace_s=0"])
        return [int(data) for data in world.gather(str(code).encode(), 0, "the exit codes")]

    return side_by_side(comm, [[(4, body)]])


def stop_while_loading(comm: MPI.Comm, checkpoint: str, prompts: str, folder: str) -> Any:
    """Rank 1 of 2 is asked to stop when it has begun to load, which would take minutes; the exit codes of both."""
    load = PipelineAdapter.load

    def slow(*args: Any) -> PipelineAdapter:
        if comm.rank == 1:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(600)
        return load(*args)

    def body(world: World) -> list[int]:
        with mock.patch.object(PipelineAdapter, "load", slow):
            code = app.run(world, [f"model.path={checkpoint}", f"prompts={prompts}", f"output.dir={folder}"])
        return [int(data) for data in world.gather(str(code).encode(), 0, "the exit codes")]

    return side_by_side(comm, [[(2, body)]])

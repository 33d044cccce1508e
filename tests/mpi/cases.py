"""What the tests of this folder run under mpirun."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcdit import app
from hpcdit.attention.methods import schedule
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import MPI, Cluster, World
from hpcdit.errors import PeerLost
from hpcdit.kernels import cpu
from hpcdit.models.loading import inspect
from hpcdit.models.wan import Wan
from hpcdit.transport.mpi import WIRES, MpiTransport
from tests.attention_cases import UNTIMED, Case
from tests.mpi.groups import each_size

SIZE, SEED, STEPS, LENGTH = (9, 48, 80), 3, 2, 24
PROMPT, NEGATIVE = "a red circle moving left on the sea", "grey"


def transports(comm: MPI.Comm) -> Any:
    """Every method on 1 to 6 ranks as nodes of 1, 2 and 3, both ways between nodes: the largest error, and how many."""

    def body(world: World) -> tuple[float, int]:
        worst, count = 0.0, 0
        for ranks_per_node in (1, 2, 3):
            nodes = Cluster(world, ranks_per_node)
            for wire in WIRES if nodes.node_count > 1 else WIRES[:1]:
                for method, ulysses, ring in degrees(world.size):
                    case = Case(
                        method,
                        ulysses,
                        ring,
                        Shape(1, 61 - world.size, max(ulysses, 5), 6),
                        layers=5,
                        pause_s=0.002,
                        seed=count,
                        pieces=count % 2,
                        groups=1 + count % 3,
                    )
                    worst = max(worst, *case.run(MpiTransport(nodes, wire)))
                    count += 1
            nodes.close()
        return world.largest(worst, "the errors"), count

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def degrees(ranks: int) -> list[tuple[str, int, int]]:
    """Every method with every pair of degrees."""
    pairs = [(d, ranks // d) for d in range(1, ranks + 1) if ranks % d == 0]
    both = [(method, *pair) for method in ("usp", "tas", "torus") for pair in pairs]
    return [("ulysses", ranks, 1), ("ring", 1, ranks), *both]


def program(comm: MPI.Comm, prompts: str, folder: str) -> Any:
    """The program on worlds of 1 to 6 ranks, two ranks a node, each into a folder of its own: exit codes by size."""

    def body(world: World) -> int:
        return app.run(world, [f"prompts={prompts}", f"output.dir={folder}/{world.size}", "cluster.ranks_per_node=2"])

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def wan_frames(comm: MPI.Comm, checkpoint: str, reference: str) -> Any:
    """Renders the tiny checkpoint on 1 to 6 ranks, every method and degree, nodes of 1, 2 and 3, with guidance and not.

    reference: an .npz with diffusers' own frames, `guided` and `unguided`. Returns by size the number of renders, and
    the largest difference from the reference in levels of 255.
    """
    folder, expected = inspect(Path(checkpoint)), np.load(reference)
    adapter = Wan.load(folder)
    shape = Shape(1, adapter.shape.tokens(*SIZE), adapter.shape.heads, adapter.shape.head_dim)
    noise = adapter.noise(SEED, *SIZE)
    torch.set_num_threads(1)

    def body(world: World) -> tuple[int, int]:
        count, worst = 0, 0
        for ranks_per_node in sorted({min(n, world.size) for n in (1, 2, 3)}):
            nodes = Cluster(world, ranks_per_node)
            for method, ulysses, ring in degrees(world.size):
                if ulysses > shape.heads:
                    continue
                guided = count % 2 == 0
                transport = MpiTransport(nodes, WIRES[count // 2 % 2])
                parallel = SequenceParallel(
                    schedule(method, ulysses, ring), shape, transport, cpu, torch.float32, UNTIMED
                )
                conditions = adapter.encode(PROMPT, NEGATIVE, guided, LENGTH)
                latents = adapter.denoise(conditions, noise, STEPS, 4.0 if guided else 1.0, parallel, lambda step: None)
                parallel.close()
                if count % world.size == world.rank:  # the decoding of each render is another rank's
                    frames = adapter.decode(latents).astype(int)
                    worst = max(worst, int(abs(frames - expected["guided" if guided else "unguided"]).max()))
                count += 1
            nodes.close()
        return count, int(world.largest(worst, "the differences"))

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def broken_thread(comm: MPI.Comm) -> None:
    """A thread of rank 1 raises while all ranks wait for each other."""
    world = World()

    def body() -> int:
        if world.rank == 1:
            threading.Thread(target=lambda: 1 / 0).start()
        world.wait(lambda: False, range(world.size), "what never comes")
        return 0

    app.guarded(world, body)


def silent_rank(comm: MPI.Comm) -> Any:
    """The last rank's heart stops; what rank 0 says of it, and after how many seconds."""
    world = World()
    world.timeout_s = 1.5
    if world.rank == world.size - 1:
        world.service.stop()
    said, start = "", time.monotonic()
    if world.rank == 0:
        try:
            world.wait(lambda: False, [world.size - 1], "a piece")
        except PeerLost as error:
            said = str(error)
    comm.Barrier()
    return said, time.monotonic() - start

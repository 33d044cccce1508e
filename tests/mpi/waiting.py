"""What the tests of this folder run under mpirun that needs no model, nor torch, and so starts at once."""

import json
import random
import threading
import time
from typing import Any

from hpcdit import app
from hpcdit.cluster import MPI, World
from hpcdit.errors import PeerLost
from hpcdit.render.queue import Queue
from hpcdit.render.sources import Listed
from hpcdit.stop import StopRequest
from tests.mpi.groups import side_by_side


def queue(comm: MPI.Comm) -> Any:
    """Groups of 1 and 2 ranks take from one queue, at random moments: what each took, and what rank 0 heard of it."""

    def body(world: World, groups: int) -> tuple[list[list[int]], list[list[int]]]:
        heard: list[list[int]] = []
        group, pause = world.part(groups), random.Random(world.rank)
        todo = Listed([[2 * n, 2 * n + 1] for n in range(100)])
        shared = Queue(world, groups, todo, StopRequest(), lambda note: heard.append(note["took"]))
        took: list[int] = []
        while batch := group.broadcast(shared.next() if group.rank == 0 else None, "a batch"):
            took += batch
            time.sleep(pause.random() * 0.002)
            if group.rank == 0:
                shared.tell(took=batch)
        shared.end(group.rank == 0, cut=False)
        every = world.gather(json.dumps(took if group.rank == 0 else []).encode(), 0, "what was taken")
        group.close()
        return [json.loads(data) for data in every], heard

    return side_by_side(comm, [[(4, lambda world: body(world, 4))], [(4, lambda world: body(world, 2))]])


def broken_thread(comm: MPI.Comm) -> None:
    """A thread of rank 1 raises while all ranks wait for each other."""
    world = World()

    def body() -> int:
        if world.rank == 1:
            threading.Thread(target=lambda: 1 / 0).start()
        world.wait(lambda: False, range(world.size), "what never comes")
        return 0

    app.guarded(world, body)


def silent_rank(comm: MPI.Comm, parts: str) -> Any:
    """The last rank's heart stops; what the first rank of its part of the world says, and after how many seconds."""
    world = World()
    world.timeout_s = 30
    group = world.part(int(parts))
    comm.Barrier()
    world.timeout_s = 1.5
    if world.rank == world.size - 1:
        world.service.stop()
    said, start = "", time.monotonic()
    if group.rank == 0 and group.members[-1] == world.size - 1:
        try:
            group.wait(lambda: False, [group.size - 1], "a piece")
        except PeerLost as error:
            said = str(error)
    found = comm.allgather((said, time.monotonic() - start))
    return next(entry for entry in found if entry[0])

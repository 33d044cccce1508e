"""Worlds of several sizes side by side, on sub-communicators of one start of mpirun."""

from collections.abc import Callable, Sequence
from typing import Any

from hpcdit.cluster import MPI, World


def each_size(comm: MPI.Comm, body: Callable[[World], Any], sizes: Sequence[Sequence[int]]) -> dict[int, Any]:
    """Calls `body` on worlds of the sizes given, those of one tuple side by side.

    Collective over `comm`. Its rank 0 gets, by size, what rank 0 of each world returned.
    """
    found: dict[int, Any] = {}
    for together in sizes:
        assert sum(together) <= comm.size, f"{sum(together)} ranks wanted, {comm.size} started"
        starts = [sum(together[:i]) for i in range(len(together))]
        mine = next((i for i, s in enumerate(starts) if s <= comm.rank < s + together[i]), None)
        group = comm.Split(MPI.UNDEFINED if mine is None else mine, comm.rank)
        said = None
        if mine is not None:
            world = World(group)
            world.timeout_s = 30
            result = body(world)
            if world.rank == 0:
                said = together[mine], result
            world.close()
            group.Free()
        found |= dict(entry for entry in comm.allgather(said) if entry)
    return found

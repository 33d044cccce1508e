"""Worlds of several sizes side by side, on sub-communicators of one start of mpirun."""

from collections.abc import Callable, Sequence
from typing import Any

from hpcdit.cluster import MPI, World

Body = Callable[[World], Any]


def side_by_side(comm: MPI.Comm, rounds: Sequence[Sequence[tuple[int, Body]]]) -> list[Any]:
    """Round by round calls each body on a world of so many ranks, those of one round side by side.

    Collective over `comm`. Its rank 0 gets what rank 0 of each world returned, in the order of the bodies.
    """
    found: list[Any] = []
    for together in rounds:
        sizes = [ranks for ranks, _ in together]
        assert sum(sizes) <= comm.size, f"{sum(sizes)} ranks wanted, {comm.size} started"
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        mine = next((i for i, s in enumerate(starts) if s <= comm.rank < s + sizes[i]), None)
        group = comm.Split(MPI.UNDEFINED if mine is None else mine, comm.rank)
        said: tuple[int, Any] | None = None
        if mine is not None:
            world = World(group)
            world.timeout_s = 30
            result = together[mine][1](world)
            if world.rank == 0:
                said = mine, result
            world.close()
            group.Free()
        found += [result for _, result in sorted(entry for entry in comm.allgather(said) if entry)]
    return found


def each_size(comm: MPI.Comm, body: Body, sizes: Sequence[Sequence[int]]) -> dict[int, Any]:
    """Calls `body` on worlds of the sizes given, those of one tuple side by side; the results by size, on rank 0."""
    results = side_by_side(comm, [[(ranks, body) for ranks in together] for together in sizes])
    return dict(zip([ranks for together in sizes for ranks in together], results, strict=True))

"""One clock for the ranks of several hosts."""

import time
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

if TYPE_CHECKING:
    from .cluster import World

TAG, WHAT = 77, "the clocks"


def offset(world: "World", tries: int = 9) -> float:
    """Seconds to add to this rank's `time.perf_counter()` to read rank 0's; from the quickest of some round trips.

    Collective. Ranks of one host share its clock, so that one of them asks.
    """
    found, leaders = np.zeros(1), [world.hosts.index(host) for host in range(max(world.hosts) + 1)]
    for leader in leaders[1:]:
        if world.rank == 0:
            for _ in range(tries):
                _swap(world, leader)
        elif world.rank == leader:
            trips = [_ask(world) for _ in range(tries)]
            found[0] = min(trips)[1]
    leader = leaders[world.hosts[world.rank]]
    world.complete(lambda: world.host_comm.Ibcast(found, 0), [leader], WHAT)
    return float(found[0])


def _ask(world: "World") -> tuple[float, float]:
    """Seconds of a round trip, and rank 0's clock less this rank's as it tells."""
    start = time.perf_counter()
    theirs = _swap(world, 0)
    end = time.perf_counter()
    return end - start, theirs - (start + end) / 2


def _swap(world: "World", peer: int) -> float:
    """Half of a ping-pong: rank 0 answers with its clock when asked; the other asks and returns the answer."""
    got = np.empty(1)

    def send() -> MPI.Request:
        return world.comm.Isend(np.array([time.perf_counter()]), peer, TAG)

    def receive() -> MPI.Request:
        return world.comm.Irecv(got, peer, TAG)

    for start in (receive, send) if world.rank == 0 else (send, receive):
        world.complete(start, [peer], WHAT, nap_s=0)
    return float(got[0])

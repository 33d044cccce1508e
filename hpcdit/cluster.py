"""MPI start-up, abort and shutdown in one place; who sits on which node.

Where a call of MPI can neither be polled nor left, because MPI is only starting or ending, an alarm ends the process
in the end; waiting in between is the groups'.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import ceil
from typing import Any

import mpi4py
import numpy as np

from .errors import BrokenRun, InputError
from .guard import let_hear
from .launch import launch_error
from .service import Service

START_S = 600  # for MPI to start: the slowest rank may read Python from a busy file system
ABORT_S = 5  # for the launcher to be told


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """SIGALRM kills this process if the body takes longer, whatever it hangs in; the guard then tells of it."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# Over TCP what a kernel has taken is in line before everything that is needed sooner; by itself it takes megabytes.
# (At 400 Mbit/s 40 ms of sending; 3 with this, at the same speed.) UCX is MPICH's, the other is Open MPI's.
for _name in ("UCX_TCP_SNDBUF", "OMPI_MCA_btl_tcp_sndbuf"):
    os.environ.setdefault(_name, str(1 << 16))

mpi4py.rc.thread_level = "multiple"  # a thread makes progress while the main thread computes
with alarm(START_S):
    from mpi4py import MPI  # this import starts MPI, with the thread level asked for above

from .clocks import offset  # noqa: E402
from .group import NAP_S, Group, Life, split  # noqa: E402
from .heartbeats import Heartbeats  # noqa: E402


class World(Group):
    """All ranks, numbered node by node, with heartbeats; what every part of the program waits and talks through."""

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        """comm: the ranks that run together; all that were started, where left out."""
        if comm is None:
            comm = MPI.COMM_WORLD
            if (why := launch_error(os.environ, comm.size)) is not None:
                raise InputError(why)
        with alarm(START_S):
            ranks, hosts = self._find_hosts(comm)
            threads, self.spare = self._threads()
            life = Life(Heartbeats(ranks, self.host_comm, hosts), Service(self._beat, self._fail), threads)
        super().__init__(ranks, range(ranks.size), hosts, life)
        self.service.start()

    def _find_hosts(self, comm: MPI.Comm) -> tuple[MPI.Intracomm, list[int]]:
        """The ranks node by node, and the host of each."""
        real = comm.Split_type(MPI.COMM_TYPE_SHARED)
        assert isinstance(real, MPI.Intracomm)
        first = np.empty(comm.size, np.int64)
        mine = np.array([real.allreduce(comm.rank, op=MPI.MIN)], np.int64)
        comm.Allgather(mine, first)
        order = sorted(set(first.tolist()))
        # Ranks of a node must follow each other, whatever order the launcher chose: meshes are numbered that way.
        ranks = split(comm, 0, order.index(mine[0]) * comm.size + real.rank)
        self.host_comm, self.hostname = real, socket.gethostname()
        return ranks, [order.index(leader) for leader in sorted(first.tolist(), key=order.index)]

    def _threads(self) -> tuple[int, bool]:
        """Threads of this rank, and whether the ranks' threads leave a core of the host to others.

        Cores of the host / ranks of the host, unless OMP_NUM_THREADS says otherwise.
        """
        cores = len(set().union(*self.host_comm.allgather(sorted(os.sched_getaffinity(0)))))
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(asked) if asked.isdigit() and int(asked) > 0 else max(1, cores // self.host_comm.size)
        return threads, sum(self.host_comm.allgather(threads)) < cores

    def _beat(self) -> None:
        self._life.beats.beat()
        for watch in (self._life.blocked, self._life.always):
            if watch is not None:
                next(watch)

    def keep_watch(self, timeout_s: float) -> None:
        """From now on the next rank is watched at any time, and `timeout_s` is what all waits use.

        So a rank that is gone is noticed where nobody waits for it: while all load the model, or by other groups.
        """
        self.timeout_s = timeout_s
        if self.size > 1:
            self._life.always = self._watch([(self.rank + 1) % self.size], "its next heartbeat")

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, MPI.Exception):
            error = self._lost(error, "what other ranks send")
        known = isinstance(error, BrokenRun)
        self.abort(4, str(error) if known else "".join(traceback.format_exception(error)))

    def abort(self, code: int, message: str) -> None:
        """Ends all ranks at once with `code`, saying which rank had to and why.

        On one host the guard of this process takes the others along, and all end with `code`. Several hosts are ended
        by the launcher, which is told by way of COMM_WORLD alone: where fewer ranks are to end, MPICH tells each of
        them, and one that hangs never hears of it.
        """
        with contextlib.suppress(OSError):  # nobody may be listening any more; the run ends all the same
            sys.stdout.flush()
            print(f"hpcdit: rank {self.rank} on {self.hostname}: {message}", file=sys.stderr, flush=True)
        if len(set(self.hosts)) > 1:
            let_hear()
            with alarm(ABORT_S):
                MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Collective end of a run in which all is well: nothing is left open that would make MPI's Finalize abort."""
        self._life.always = None
        self.barrier("the end of the run")
        with alarm(ceil(self.timeout_s)):  # nobody watches any more
            self._poll(self._life.beats.settled)
            self._poll(self.comm.Ibarrier().Test)
            self.service.stop()
            self._life.beats.close()
            self.comm.Free()
            self.host_comm.Free()

    @staticmethod
    def _poll(done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(NAP_S[1])

    def clock_offset(self) -> float:
        """Seconds to add to this rank's `time.perf_counter()` to read rank 0's."""
        return offset(self)


class Cluster:
    """A world, or a group of its ranks, cut into nodes: those of the machine, or those that stand for nodes."""

    def __init__(
        self, world: Group, ranks_per_node: int | None = None, nodes: Sequence[Hashable] | None = None
    ) -> None:
        """ranks_per_node: so many ranks stand for a node; nodes: the node of each rank, numbered anew in their order.

        Collective over `world`.
        """
        self.world = world
        keys = nodes if nodes is not None else self._found(ranks_per_node)
        order = list(dict.fromkeys(keys))
        self.nodes = tuple(order.index(key) for key in keys)
        self.node = self.nodes[world.rank]
        with world.blocking("the nodes"):
            self.node_comm = split(world.comm, self.node, world.rank)
        self.local_rank = self.node_comm.rank

    def _found(self, ranks_per_node: int | None) -> list[tuple[int, int]]:
        """What tells each rank's node from others: its host, and which of the nodes there."""
        counts: dict[int, int] = {}
        keys = []
        for host in self.world.hosts:
            local = counts[host] = counts.get(host, -1) + 1
            keys.append((host, local // ranks_per_node if ranks_per_node else 0))
        return keys

    def part(self, group: Group) -> "Cluster":
        """The nodes of this rank's `group` of the ranks, as they are cut here. Collective over `group`."""
        at = {member: node for member, node in zip(self.world.members, self.nodes, strict=True)}
        return Cluster(group, nodes=[at[member] for member in group.members])

    @property
    def node_count(self) -> int:
        return self.nodes[-1] + 1

    def describe(self) -> dict[str, Any]:
        """For the provenance and the log."""
        return {
            "ranks": self.world.size,
            "nodes": self.node_count,
            "ranks_per_node": [self.nodes.count(node) for node in range(self.node_count)],
            "hosts": len(set(self.world.hosts)),
            "threads_per_rank": self.world.cores,
            "mpi": MPI.Get_library_version().split("\n")[0].strip("\0 "),
        }

    def close(self) -> None:
        with self.world.blocking("the end of the nodes"):
            self.node_comm.Free()


def finalize(timeout_s: float) -> None:
    """The end of MPI in this process, after `timeout_s` by force; every World is closed by now."""
    with alarm(ceil(timeout_s)):
        MPI.Finalize()

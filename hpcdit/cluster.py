"""MPI start-up, waiting, abort and shutdown in one place; who sits on which node.

Every wait polls and naps: MPI's own blocking calls spin, which takes the cores from the ranks that compute, and they
cannot be left when a peer is gone. While it waits, a rank watches the heartbeats of the ranks it waits for. Where a
call can neither be polled nor left, because MPI is only starting or ending, an alarm ends the process in the end.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import mpi4py
import numpy as np

from .errors import BrokenRun, InputError
from .launch import launch_error
from .service import Service

T = TypeVar("T")

NAP_S = 50e-6, 1e-3  # first and longest nap of a wait
START_S = 600  # for MPI to start: the slowest rank may read Python from a busy file system
END_S = 60  # for MPI to end, after all ranks have said that they end
ABORT_S = 5  # for the launcher to be told


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """SIGALRM kills this process if the body takes longer, whatever it hangs in; the guard then tells of it."""
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


mpi4py.rc.thread_level = "multiple"  # a thread makes progress while the main thread computes
with alarm(START_S):
    from mpi4py import MPI  # this import starts MPI, with the thread level asked for above

from .clocks import offset  # noqa: E402
from .heartbeats import CHECK_S, Heartbeats  # noqa: E402


def split(comm: MPI.Comm, color: int, key: int) -> MPI.Intracomm:
    """The ranks of `comm` with the same `color`, ordered by `key`."""
    found = comm.Split(color, key)
    assert isinstance(found, MPI.Intracomm)
    return found


class World:
    """All ranks, numbered node by node, with heartbeats; what every part of the program waits and talks through."""

    def __init__(self, comm: MPI.Comm | None = None) -> None:
        """comm: the ranks that run together; all that were started, where left out."""
        if comm is None:
            comm = MPI.COMM_WORLD
            if (why := launch_error(os.environ, comm.size)) is not None:
                raise InputError(why)
        self.timeout_s = 60.0  # until the configuration is known
        with alarm(START_S):
            self._find_hosts(comm)
            self._beats = Heartbeats(self.comm, self.host_comm, self.hosts)
        self._blocked: Iterator[None] | None = None
        self.service = Service(self._beat, self._fail)
        self.service.start()

    def _find_hosts(self, comm: MPI.Comm) -> None:
        real = comm.Split_type(MPI.COMM_TYPE_SHARED)
        assert isinstance(real, MPI.Intracomm)
        first = np.empty(comm.size, np.int64)
        mine = np.array([real.allreduce(comm.rank, op=MPI.MIN)], np.int64)
        comm.Allgather(mine, first)
        order = sorted(set(first.tolist()))
        # Ranks of a node must follow each other, whatever order the launcher chose: meshes are numbered that way.
        self.comm = split(comm, 0, order.index(mine[0]) * comm.size + real.rank)
        self.rank, self.size = self.comm.rank, self.comm.size
        self.hosts = tuple(order.index(leader) for leader in sorted(first.tolist(), key=order.index))
        self.host_comm = real
        self.cores = self._threads()
        self.hostname = socket.gethostname()

    def _threads(self) -> int:
        """Cores of the host / ranks of the host, unless OMP_NUM_THREADS says otherwise."""
        if (asked := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]).isdigit() and int(asked) > 0:
            return int(asked)
        cores = set().union(*self.host_comm.allgather(sorted(os.sched_getaffinity(0))))
        return max(1, len(cores) // self.host_comm.size)

    def _beat(self) -> None:
        self._beats.beat()
        if (watch := self._blocked) is not None:
            next(watch)

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
            with alarm(ABORT_S):
                MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def close(self) -> None:
        """Collective end of a run in which all is well: nothing is left open that would make MPI's Finalize abort."""
        self.barrier("the end of the run")
        with alarm(END_S):  # nobody watches any more
            self._poll(self._beats.settled)
            self._poll(self.comm.Ibarrier().Test)
            self.service.stop()
            self._beats.close()
            self.comm.Free()
            self.host_comm.Free()

    # Waiting

    def wait(self, done: Callable[[], bool], peers: Sequence[int], what: str, nap_s: float = NAP_S[0]) -> None:
        """Polls `done` with naps until it holds. Raises PeerLost if one of `peers` is silent for timeout_s, or gone."""
        watch, check = None, time.monotonic() + CHECK_S
        with self.talking(what):
            while not done():
                time.sleep(nap_s)
                nap_s = min(nap_s * 1.2, NAP_S[1])
                if time.monotonic() > check:
                    watch = watch or self._beats.watch(peers, what, self.timeout_s)
                    next(watch)

    @staticmethod
    def _poll(done: Callable[[], bool]) -> None:
        while not done():
            time.sleep(NAP_S[1])

    @contextlib.contextmanager
    def talking(self, what: str) -> Iterator[None]:
        """Around calls that talk to other ranks: PeerLost instead of MPI's error when a connection is broken."""
        try:
            yield
        except MPI.Exception as error:
            if (found := self._lost(error, what)) is error:
                raise
            raise found from error

    def _lost(self, error: MPI.Exception, what: str) -> Exception:
        return self._beats.lost(error, range(self.size), what, self.timeout_s)

    @contextlib.contextmanager
    def blocking(self, what: str) -> Iterator[None]:
        """Around collective calls of MPI that cannot be polled: the service thread ends the run if a peer is lost."""
        self.barrier(what)  # so that the call itself is short, and a late rank is waited for without spinning
        self._blocked = self._beats.watch(range(self.size), what, self.timeout_s)
        try:
            with self.talking(what):
                yield
        finally:
            self._blocked = None

    def complete(
        self, start: Callable[[], MPI.Request], peers: Sequence[int], what: str, nap_s: float = NAP_S[0]
    ) -> None:
        """Starts a request, and waits for its end as `wait` does."""
        with self.talking(what):
            request = start()
        self.wait(request.Test, peers, what, nap_s)

    def barrier(self, what: str) -> None:
        self.complete(self.comm.Ibarrier, range(self.size), what)

    def broadcast(self, value: Any, what: str, root: int = 0) -> Any:
        """`value` of `root` on every rank, as JSON carries it."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy() if self.rank == root else None
        size = np.array([0 if data is None else len(data)], np.int64)
        self.complete(lambda: self.comm.Ibcast(size, root), [root], what)
        content = np.empty(size[0], np.uint8) if data is None else data
        self.complete(lambda: self.comm.Ibcast(content, root), [root], what)
        return json.loads(content.tobytes())

    def agree(self, first: Callable[[], Any], what: str) -> Any:
        """What `first` returns on rank 0, on every rank; an InputError of it is raised on every rank."""
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                answer = {"value": first()}
            except InputError as error:
                answer = {"error": str(error)}
        answer = self.broadcast(answer, what)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer["value"]

    def together(self, body: Callable[[], T], what: str) -> T:
        """What `body` returns on this rank; an InputError of any rank's `body` is raised on every rank."""
        error, value = "", None
        try:
            value = body()
        except InputError as wrong:
            error = str(wrong)
        if self.largest(bool(error), what):
            said = self.gather(error.encode(), 0, what)
            raise InputError(self.broadcast(next((text.decode() for text in said if text), ""), what))
        return cast(T, value)

    def largest(self, value: float, what: str) -> float:
        """The largest `value` of all ranks, on all ranks."""
        mine, found = np.array([float(value)]), np.empty(1)
        self.complete(lambda: self.comm.Iallreduce(mine, found, MPI.MAX), range(self.size), what)
        return float(found[0])

    def gather(self, data: bytes, root: int, what: str) -> list[bytes]:
        """All ranks' `data` by rank on `root`; an empty list elsewhere."""
        size, sizes = np.array([len(data)], np.int64), np.empty(self.size, np.int64)
        self.complete(lambda: self.comm.Iallgather(size, sizes), range(self.size), what)
        every = np.empty(int(sizes.sum()) if self.rank == root else 0, np.uint8)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        into = [every, sizes.tolist(), starts[:-1].tolist(), MPI.BYTE] if self.rank == root else None
        send = np.frombuffer(data, np.uint8)
        self.complete(lambda: self.comm.Igatherv([send, MPI.BYTE], into, root), range(self.size), what)
        if self.rank != root:
            return []
        return [every[a:b].tobytes() for a, b in pairwise(starts)]

    def clock_offset(self) -> float:
        """Seconds to add to this rank's `time.perf_counter()` to read rank 0's."""
        return offset(self)


class Cluster:
    """The world cut into nodes: those of the machine, or groups of `ranks_per_node` that stand for nodes."""

    def __init__(self, world: World, ranks_per_node: int | None = None) -> None:
        self.world = world
        counts: dict[int, int] = {}
        keys = []
        for host in world.hosts:
            local = counts[host] = counts.get(host, -1) + 1
            keys.append((host, local // ranks_per_node if ranks_per_node else 0))
        order = list(dict.fromkeys(keys))
        self.nodes = tuple(order.index(key) for key in keys)
        self.node = self.nodes[world.rank]
        with world.blocking("the nodes"):
            self.node_comm = split(world.comm, self.node, world.rank)
        self.local_rank = self.node_comm.rank

    @property
    def node_count(self) -> int:
        return self.nodes[-1] + 1

    def describe(self) -> dict[str, Any]:
        """For the provenance and the log."""
        return {
            "ranks": self.world.size,
            "nodes": self.node_count,
            "ranks_per_node": [self.nodes.count(node) for node in range(self.node_count)],
            "hosts": max(self.world.hosts) + 1,
            "threads_per_rank": self.world.cores,
            "mpi": MPI.Get_library_version().split("\n")[0].strip("\0 "),
        }

    def close(self) -> None:
        with self.world.blocking("the end of the nodes"):
            self.node_comm.Free()


def finalize() -> None:
    """The end of MPI in this process; every World is closed by now."""
    with alarm(END_S):
        MPI.Finalize()

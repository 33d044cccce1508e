"""Ranks that wait for each other and talk to each other: the whole world, or a part of it.

Every wait polls and naps: MPI's own blocking calls spin, which takes the cores from the ranks that compute, and they
cannot be left when a peer is gone. While it waits, a rank watches the heartbeats of the ranks it waits for.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
from mpi4py import MPI

from .errors import BrokenRun, InputError, Stopped
from .heartbeats import CHECK_S, Heartbeats
from .service import Service

T = TypeVar("T")

NAP_S = 50e-6, 1e-3  # first and longest nap of a wait
FATAL = BrokenRun, Stopped, MPI.Exception  # what is no failure of one video, but of what ranks talk through


def split(comm: MPI.Comm, color: int, key: int) -> MPI.Intracomm:
    """The ranks of `comm` with the same `color`, ordered by `key`."""
    found = comm.Split(color, key)
    assert isinstance(found, MPI.Intracomm)
    return found


@dataclass
class Life:
    """What all groups of a process share.

    Looks at heartbeats by the service thread: blocked, while the main thread is in a call of MPI; always, at any time.
    """

    beats: Heartbeats
    service: Service
    cores: int
    timeout_s: float = 60.0  # until the configuration is known
    blocked: Iterator[None] | None = None
    always: Iterator[None] | None = None


class Group:
    """Some ranks of the world, numbered in its order.

    members: their ranks in the world, by rank in the group; hosts: the number of each one's host. Every `peers` and
    `root` is a rank in the group; what is said of a lost rank names its rank in the world.
    """

    def __init__(self, comm: MPI.Intracomm, members: Sequence[int], hosts: Sequence[int], life: Life) -> None:
        self.comm, self.members, self.hosts, self._life = comm, tuple(members), tuple(hosts), life
        self.rank, self.size = comm.rank, comm.size
        self.service, self.cores = life.service, life.cores

    @property
    def timeout_s(self) -> float:
        """Seconds until a rank without a sign of life counts as lost; one value for all groups of a process."""
        return self._life.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._life.timeout_s = seconds

    def part(self, count: int) -> "Group":
        """The part that this rank is in when the ranks are cut into `count` consecutive parts of one size."""
        if self.size % count:
            raise ValueError(f"{self.size} ranks cannot be cut into {count} parts of one size")
        each = self.size // count
        first = self.rank // each * each
        return self._some(range(first, first + each))

    def across(self, count: int) -> "Group":
        """This rank, and those at the same place of each other part, where the ranks are cut as for `part`."""
        each = self.size // count
        return self._some(range(self.rank % each, self.size, each))

    def _some(self, ranks: range) -> "Group":
        """The group of `ranks`, one of which this is; all others are in a group at the same time."""
        with self.blocking("the groups"):
            comm = split(self.comm, ranks.start, self.rank)
        chosen = slice(ranks.start, ranks.stop, ranks.step)
        return Group(comm, self.members[chosen], self.hosts[chosen], self._life)

    def close(self) -> None:
        """Collective over the group."""
        with self.blocking("the end of a group"):
            self.comm.Free()

    def _watch(self, peers: Sequence[int], what: str) -> Iterator[None]:
        return self._life.beats.watch([self.members[peer] for peer in peers], what, self.timeout_s)

    def wait(self, done: Callable[[], bool], peers: Sequence[int], what: str, nap_s: float = NAP_S[0]) -> None:
        """Polls `done` with naps until it holds. Raises PeerLost if one of `peers` is silent for timeout_s, or gone."""
        watch, check = None, time.monotonic() + CHECK_S
        with self.talking(what):
            while not done():
                time.sleep(nap_s)
                nap_s = min(nap_s * 1.2, NAP_S[1])
                if time.monotonic() > check:
                    watch = watch or self._watch(peers, what)
                    next(watch)

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
        return self._life.beats.lost(error, self.members, what, self.timeout_s)

    @contextlib.contextmanager
    def blocking(self, what: str) -> Iterator[None]:
        """Around collective calls of MPI that cannot be polled: the service thread ends the run if a peer is lost."""
        self.barrier(what)  # so that the call itself is short, and a late rank is waited for without spinning
        self._life.blocked = self._watch(range(self.size), what)
        try:
            with self.talking(what):
                yield
        finally:
            self._life.blocked = None

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
        return json.loads(self.share(json.dumps(value).encode() if self.rank == root else b"", what, root))

    def share(self, data: bytes, what: str, root: int = 0) -> bytes:
        """`data` of `root` on every rank."""
        size = np.array([len(data)], np.int64)
        self.complete(lambda: self.comm.Ibcast(size, root), [root], what)
        content = np.frombuffer(data, np.uint8).copy() if self.rank == root else np.empty(size[0], np.uint8)
        self.complete(lambda: self.comm.Ibcast(content, root), [root], what)
        return content.tobytes()

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
        """What `body` returns on this rank; an InputError or Stopped of any rank's `body` is raised on every rank."""
        kinds = InputError, Stopped
        error: Exception | None = None
        value = None
        try:
            value = body()
        except kinds as raised:
            error = raised
        mine = next((n for n, kind in enumerate(kinds, 1) if isinstance(error, kind)), 0)
        if found := round(self.largest(mine, what)):
            kind = kinds[found - 1]
            said = self.gather(str(error).encode() if isinstance(error, kind) else b"", 0, what)
            raise kind(self.broadcast(next((text.decode() for text in said if text), ""), what))
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

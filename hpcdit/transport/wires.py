"""Symmetric memory in MPI windows, and the two ways in which blocks travel between nodes."""

import heapq
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from ..cluster import Cluster
from ..group import Group
from ..heartbeats import array
from ..service import BUSY_S, EXPECTING_S, IDLE_S
from .base import Exchange, Pattern, Place, Transfer

# Bytes of a message: few enough that MPI sends it without asking its receiver, enough that a part is worth its calls.
PART = 1 << 17
AHEAD = 4  # parts of a transfer that are expected at the same time
RECENTLY_S = 10e-3  # when a part came so lately, another one is on its way


class Window:
    """Parts of transfers that wait for their turn, the first transfer in the pattern's order first.

    One part is under way, or several until they have `nbytes` together: as much as a link carries while a message
    passes and its answer. With more, what is needed first would share the link with what is needed later.
    """

    def __init__(
        self,
        nbytes: int,
        parts: Callable[[Transfer], Sequence[int]],
        start: Callable[[Transfer, int, int], MPI.Request],
    ) -> None:
        """parts: bytes of each part of a transfer; start(transfer, buffer set, part) is called when its turn comes."""
        self._nbytes, self._parts, self._start = nbytes, parts, start
        self._waiting: list[tuple[int, int, Transfer, int, int]] = []
        self._under_way: list[tuple[MPI.Request, tuple[Transfer, int, int]]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._under_way)

    def add(self, number: int, transfer: Transfer, which: int, round_: int) -> None:
        """number: the transfer's, in the pattern."""
        heapq.heappush(self._waiting, (round_, number, transfer, which, 0))
        self._fill()

    def poll(self) -> list[tuple[Transfer, int]]:
        """(transfer, round) of those that have ended since the last poll."""
        ended = [transfer_part for _, transfer_part in done(self._under_way)]
        self._fill()
        return [(transfer, round_) for transfer, round_, part in ended if part == len(self._parts(transfer)) - 1]

    def _fill(self) -> None:
        size = sum(self._parts(transfer)[part] for _, (transfer, _, part) in self._under_way)
        while self._waiting and (not self._under_way or size < self._nbytes):
            round_, number, transfer, which, part = heapq.heappop(self._waiting)
            self._under_way.append((self._start(transfer, which, part), (transfer, round_, part)))
            parts = self._parts(transfer)
            size += parts[part]
            if part + 1 < len(parts):
                heapq.heappush(self._waiting, (round_, number, transfer, which, part + 1))


Tagged = TypeVar("Tagged")


def done(requests: list[tuple[MPI.Request, Tagged]]) -> list[tuple[MPI.Request, Tagged]]:
    """Takes those that have ended out of `requests`: one look of MPI for all, where a look at each costs as much."""
    indices = MPI.Request.Testsome([request for request, _ in requests]) if requests else None
    ended = [requests[index] for index in indices or ()]
    for index in sorted(indices or (), reverse=True):
        del requests[index]
    return ended


def one_sided(world: Group) -> bool:
    """Whether this MPI makes windows between these hosts: Open MPI 4 does it with UCX alone. Collective."""
    missing = False
    with world.blocking("a window"):
        try:
            MPI.Win.Create(bytearray(8), comm=world.comm).Free()
        except MPI.Exception:
            missing = True
    return not world.largest(missing, "a window")


class Memory:
    """Symmetric memory: `nbytes` of each rank, read in place inside the node."""

    def __init__(self, cluster: Cluster, nbytes: int, far: bool = False) -> None:
        """far: other nodes reach it, by `window`. Collective."""
        self._cluster = cluster
        self._shared = MPI.Win.Allocate_shared(max(nbytes, 8), 1, comm=cluster.node_comm)
        self._shared.Lock_all()
        self.window = MPI.WIN_NULL
        if far:
            self.window = MPI.Win.Create(self._shared.tomemory(), 1, comm=cluster.world.comm)
            self.window.Lock_all()
        self._first = cluster.nodes.index(cluster.node)

    def of(self, rank: int) -> np.ndarray | None:
        """The bytes of `rank`, or None if it is on another node."""
        if self._cluster.nodes[rank] != self._cluster.node:
            return None
        return array(self._shared.Shared_query(rank - self._first)[0])

    def get(self, into: np.ndarray, rank: int, at: int) -> MPI.Request:
        """Begins to copy bytes of `rank`, of this node, from `at` on."""
        return self._shared.Rget([into, MPI.BYTE], rank - self._first, [at, into.nbytes, MPI.BYTE])

    def sync(self) -> None:
        """A memory barrier, before a signal is given and after it was seen."""
        self._shared.Sync()

    def close(self) -> None:
        for window in (self.window, self._shared):
            if window != MPI.WIN_NULL:
                window.Unlock_all()
                window.Free()


class Wire(ABC):
    """How blocks travel between nodes. Called under the exchange's lock, from the main and the service thread."""

    @abstractmethod
    def begin(self, which: int, number: int) -> None:
        """Round `number` begins, on buffer set `which`."""

    @abstractmethod
    def start(self, transfer: Transfer, which: int, number: int) -> None:
        """The source block of `transfer`, in this rank's memory, is written."""

    @abstractmethod
    def poll(self) -> list[tuple[Transfer, int]]:
        """(transfer, round) of what has arrived in this rank's memory since the last poll."""

    @abstractmethod
    def leaving(self) -> bool:
        """Whether blocks of this rank are still to leave its memory."""

    @abstractmethod
    def patience(self) -> float:
        """Seconds until the next poll, see Service."""

    @abstractmethod
    def close(self) -> None: ...


class PersistentWire(Wire):
    """Both ends know every transfer in advance: requests are made once, and receives are posted ahead of what comes.

    Blocks travel in parts. A large message waits for its receiver's consent, and that would stand behind what the
    receiver itself has under way on the same connection: the two directions would take turns. (Measured, two nodes
    that send to each other at 400 Mbit/s: 24 MB/s in most rounds, 48 with parts.)
    """

    def __init__(
        self, pattern: Pattern, comm: MPI.Comm, buffers: Callable[[Place, int], np.ndarray], window: int
    ) -> None:  # fmt: skip
        self._pattern = pattern
        self._requests: dict[tuple[Transfer, int], list[MPI.Prequest]] = {}
        self._inward = [t for t in pattern.transfers if t.target.rank == comm.rank]
        self._number_of = {t: n for n, t in enumerate(pattern.transfers) if t.source.rank == comm.rank}
        self._comm = comm.Dup()  # tags of this exchange meet no others
        for number, t in enumerate(pattern.transfers):
            for which in range(Exchange.SETS):
                tag = number * Exchange.SETS + which
                if t.target.rank == comm.rank:
                    parts = self._cut(buffers(t.target, which))
                    self._requests[t, which] = [self._comm.Recv_init(part, t.source.rank, tag) for part in parts]
                elif t.source.rank == comm.rank:
                    parts = self._cut(buffers(t.source, which))
                    self._requests[t, which] = [self._comm.Send_init(part, t.target.rank, tag) for part in parts]
        # Of each transfer the part that comes next; parts of one transfer come in their order.
        self._receiving: list[tuple[MPI.Request, tuple[Transfer, int, int, int]]] = []
        self._sending = Window(window, self._parts, self._send)
        self._moved = 0.0  # when a part came last

    @staticmethod
    def _cut(block: np.ndarray) -> list[np.ndarray]:
        return [block[at : at + PART] for at in range(0, max(len(block), 1), PART)]

    def _parts(self, transfer: Transfer) -> list[int]:
        nbytes = self._pattern.nbytes(transfer.source)
        return [min(PART, nbytes - at) for at in range(0, max(nbytes, 1), PART)]

    def _send(self, transfer: Transfer, which: int, part: int) -> MPI.Request:
        request = self._requests[transfer, which][part]
        request.Start()
        return request

    def begin(self, which: int, number: int) -> None:
        for t in self._inward:
            requests = self._requests[t, which]
            for request in requests[:AHEAD]:
                request.Start()
            self._receiving.append((requests[0], (t, which, 0, number)))

    def start(self, transfer: Transfer, which: int, number: int) -> None:
        self._sending.add(self._number_of[transfer], transfer, which, number)

    def poll(self) -> list[tuple[Transfer, int]]:
        self._sending.poll()
        arrived = []
        for _, (transfer, which, part, number) in done(self._receiving):
            self._moved = time.monotonic()
            requests = self._requests[transfer, which]
            if part + AHEAD < len(requests):
                requests[part + AHEAD].Start()
            if part + 1 < len(requests):
                self._receiving.append((requests[part + 1], (transfer, which, part + 1, number)))
            else:
                arrived.append((transfer, number))
        return arrived

    def leaving(self) -> bool:
        return bool(self._sending)

    def patience(self) -> float:
        if self._sending or time.monotonic() - self._moved < RECENTLY_S:
            return BUSY_S
        return EXPECTING_S if self._receiving else IDLE_S

    def close(self) -> None:
        for requests in self._requests.values():
            for request in requests:
                request.Free()
        self._comm.Free()


class RmaWire(Wire):
    """The owner flags a written block in the reader's memory; the reader gets it. Nothing is matched at run time."""

    def __init__(
        self, pattern: Pattern, world: Group, memory: Memory, offsets: Callable[[Place, int], int],
        buffers: Callable[[Place, int], np.ndarray], flags: Memory, window: int,
    ) -> None:  # fmt: skip
        self._window, self._flags, self._offsets, self._buffers = memory.window, flags, offsets, buffers
        self._inward = [(n, t) for n, t in enumerate(pattern.transfers) if t.target.rank == world.rank]
        self._number_of = {t: n for n, t in enumerate(pattern.transfers)}
        mine = flags.of(world.rank)
        assert mine is not None
        self._flag = mine.view(np.int64)
        self._flag[:] = 0
        self._expected: dict[int, tuple[Transfer, int, int]] = {}
        self._getting = Window(window, lambda transfer: [pattern.nbytes(transfer.source)], self._get)
        self._flagging: list[tuple[MPI.Request, np.ndarray, np.ndarray]] = []

    def begin(self, which: int, number: int) -> None:
        self._expected |= {n: (t, which, number) for n, t in self._inward}

    def start(self, transfer: Transfer, which: int, number: int) -> None:
        value, before = np.array([number], np.int64), np.empty(1, np.int64)
        at = [self._number_of[transfer] * value.itemsize, 1, MPI.INT64_T]
        # The end of a Raccumulate says nothing of the target: MPI may hold it back until a flush, which would block.
        # The old value is only here when the new one is there.
        request = self._flags.window.Rget_accumulate(value, before, transfer.target.rank, at, op=MPI.REPLACE)
        self._flagging.append((request, value, before))

    def poll(self) -> list[tuple[Transfer, int]]:
        self._flagging = [flag for flag in self._flagging if not flag[0].Test()]
        self._flags.sync()
        for n, (t, which, number) in list(self._expected.items()):
            if self._flag[n] >= number:
                self._getting.add(n, t, which, number)
                del self._expected[n]
        return self._getting.poll()

    def _get(self, transfer: Transfer, which: int, part: int) -> MPI.Request:
        into = self._buffers(transfer.target, which)
        return self._window.Rget(
            into, transfer.source.rank, [self._offsets(transfer.source, which), into.nbytes, MPI.BYTE]
        )

    def leaving(self) -> bool:
        # A reader's get may come later: two buffer sets keep the block until then. Only the flags must be out.
        return bool(self._flagging)

    def patience(self) -> float:
        # While a rank expects blocks others read its own, and an MPI that emulates that needs this rank's progress.
        return BUSY_S if self._flagging or self._expected or self._getting else IDLE_S

    def close(self) -> None:
        self._flags.close()

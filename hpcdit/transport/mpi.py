"""One-sided transfers over MPI: windows that a node shares, and two ways between nodes behind one interface.

One piece of memory is reached both ways, on MPICH and on Open MPI: `Allocate_shared` for the node, `Create` over the
same memory for the world. Ranks of a node read each other in place. Between nodes a block travels either by the
reader's `Rget` once the owner has flagged it (network cards that do RMA themselves), or by persistent requests posted
before the round begins (over TCP, where RMA is emulated, they are faster); `MpiTransport` measures and chooses.
"""

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch

from ..cluster import Cluster
from ..errors import InputError
from ..service import BUSY_S, IDLE_S
from .base import Exchange, Pattern, Place, Transfer, Transport, probe
from .wires import Memory, PersistentWire, RmaWire, Wire, one_sided

WIRES = ("persistent", "rma")
CLEARLY = 1.2
SMALL, LARGE = 1 << 6, 1 << 18  # bytes of blocks that are sent to measure links


class MpiExchange(Exchange):
    """Blocks in shared windows; a counter a block says in which round it was last made readable."""

    def __init__(self, transport: "MpiTransport", pattern: Pattern, wire: str) -> None:
        self._transport, self._pattern = transport, pattern
        self._world = transport.cluster.world
        with self._world.blocking("the buffers of a video shape"):
            self._set_up(wire)

    def _set_up(self, wire: str) -> None:
        pattern, cluster, me = self._pattern, self._transport.cluster, self._world.rank
        self._stride = [-(-pattern.elements(r) * pattern.dtype.itemsize // 64) * 64 for r in range(self._world.size)]
        by_rma = wire == "rma" and bool(pattern.transfers)
        self._memory = Memory(cluster, self._stride[me] * self.SETS, far=by_rma)
        self._counters = Memory(cluster, 8 * len(pattern.spans[me]))
        near = [rank for rank in range(self._world.size) if cluster.nodes[rank] == cluster.node]
        self._bytes = {rank: found for rank in near if (found := self._memory.of(rank)) is not None}
        self._count = {rank: found.view(np.int64) for rank in near if (found := self._counters.of(rank)) is not None}
        self._count[me][:] = 0
        self._tensors = {(rank, which): self._tensor(rank, which) for rank in self._bytes for which in range(self.SETS)}
        self._round, self._lock = 0, threading.Lock()
        self._onward: dict[Place, list[Transfer]] = {}
        for t in pattern.transfers:
            if t.source.rank == me:
                self._onward.setdefault(t.source, []).append(t)
        self._from = {t.target: t.source.rank for t in pattern.transfers if t.target.rank == me}
        self._wire: Wire | None = None
        if pattern.transfers:
            self._wire = self._make_wire(wire)
            self._world.service.add(self._poll)
        self._world.barrier("the buffers of a video shape")  # counters are zero everywhere

    def _make_wire(self, name: str) -> Wire:
        if name == "persistent":
            return PersistentWire(self._pattern, self._world.comm, self._buffer, self._transport.window)
        flags = Memory(self._transport.cluster, 8 * len(self._pattern.transfers), far=True)
        return RmaWire(
            self._pattern, self._world, self._memory, self._offset, self._buffer, flags, self._transport.window
        )

    def _offset(self, place: Place, which: int) -> int:
        at = self._pattern.spans[place.rank][place.block][0] * self._pattern.dtype.itemsize
        return which * self._stride[place.rank] + at

    def _buffer(self, place: Place, which: int) -> np.ndarray:
        start = self._offset(place, which)
        return self._bytes[place.rank][start : start + self._pattern.nbytes(place)]

    def _tensor(self, rank: int, which: int) -> torch.Tensor:
        start = which * self._stride[rank]
        end = start + self._pattern.elements(rank) * self._pattern.dtype.itemsize
        if start == end:
            return torch.empty(0, dtype=self._pattern.dtype)
        return torch.from_numpy(self._bytes[rank][start:end]).view(self._pattern.dtype)

    def memory(self, rank: int, which: int) -> torch.Tensor | None:
        return self._tensors.get((rank, which))

    def begin(self) -> int:
        self._round += 1
        which = self._round % self.SETS
        if self._wire:
            with self._lock, self._world.talking(f"pieces, layer {self._round}"):
                self._wire.begin(which, self._round)
        return which

    def signal(self, place: Place) -> None:
        self._memory.sync()
        self._count[place.rank][place.block] = self._round
        if place in self._onward:
            with self._lock, self._world.talking(f"pieces to leave, layer {self._round}"):
                self._start(place, self._round)

    def _start(self, place: Place, number: int) -> None:
        assert self._wire is not None
        for t in self._onward[place]:
            self._transport.traffic.inter += self._pattern.nbytes(place)
            self._wire.start(t, number % self.SETS, number)

    def _poll(self) -> float:
        """Makes progress; what arrived becomes readable for this node, and goes on to where it is wanted next.

        Returns the seconds until the next poll, see Service.
        """
        if not self._lock.acquire(blocking=False):
            return BUSY_S  # the other thread is at it
        try:
            if self._wire is None:  # closed, and the service thread had not heard yet
                return IDLE_S
            for t, number in self._wire.poll():
                self._memory.sync()
                self._count[t.target.rank][t.target.block] = number
                if t.target in self._onward:
                    self._start(t.target, number)
            return self._wire.patience()
        finally:
            self._lock.release()

    def wait(self, place: Place) -> None:
        counter, number = self._count[place.rank], self._round
        if counter[place.block] < number:
            source = self._from.get(place, place.rank)
            what = f"{self._pattern.names[place.rank][place.block]}, layer {number}"
            if source == self._world.rank:  # an o of this rank, written by whoever has finished it
                what, peers = f"a part of {what}", list(range(self._world.size))
            else:
                what, peers = f"{what}, from rank {self._world.members[source]}", [source]

            def arrived() -> bool:
                if self._wire:
                    self._poll()
                self._memory.sync()
                return bool(counter[place.block] >= number)

            self._world.wait(arrived, peers, what)
        self._memory.sync()

    def quiet(self) -> None:
        if self._wire is None:
            return
        wire = self._wire

        def gone() -> bool:
            self._poll()
            return not wire.leaving()

        peers = sorted({t.target.rank for transfers in self._onward.values() for t in transfers})
        self._world.wait(gone, peers, f"its own pieces to leave, layer {self._round}")

    def close(self) -> None:
        with self._world.blocking("the end of a video shape"):
            if self._wire:
                self._world.service.remove(self._poll)
                with self._lock:
                    wire, self._wire = self._wire, None
                    wire.close()
            self._bytes, self._count, self._tensors = {}, {}, {}
            self._counters.close()
            self._memory.close()


class MpiTransport(Transport):
    """MPI one-sided communication between CPU tensors of all ranks of `cluster`."""

    def __init__(self, cluster: Cluster, inter: str = "auto") -> None:
        """inter: `persistent`, `rma`, or `auto` to take the quicker one by a short measurement between the nodes.

        Raises InputError for `rma` where this MPI has none between these hosts; `auto` passes it over then.
        """
        super().__init__(rank=cluster.world.rank, nodes=cluster.nodes)
        self.cluster = cluster
        self._seconds: dict[str, float] = {}
        self.window = LARGE  # bytes that a rank has under way
        if cluster.node_count == 1:
            self.inter = "none"
        elif inter == "auto":
            wires = WIRES if one_sided(cluster.world) else ("persistent",)
            self._choose(wires)
        elif inter == "rma" and not one_sided(cluster.world):
            raise InputError(
                "transport.inter=rma: this MPI has no one-sided communication between these hosts (Open MPI 4 has it"
                " with UCX alone); allowed: auto or persistent, or `mpirun --mca pml ucx --mca osc ucx,sm`"
            )
        else:
            self._choose((inter,))
        self.traffic.intra = self.traffic.inter = 0

    def _choose(self, wires: Sequence[str]) -> None:
        """The quicker wire, and as much under way on it as it carries while a message passes and its answer.

        The first of `wires` unless another is clearly quicker: `rma` needs more messages, and many go on at once in a
        layer.
        """
        self._seconds = {wire: self._measure(wire, LARGE) for wire in wires}
        self.inter = min(wires, key=lambda wire: self._seconds[wire] * (1.0 if wire == wires[0] else CLEARLY))
        latency = self._measure(self.inter, SMALL)
        self.window = int(2 * latency / self._seconds[self.inter] * LARGE)

    def exchange(self, pattern: Pattern) -> MpiExchange:
        return MpiExchange(self, pattern, self.inter)

    def describe(self) -> dict[str, str]:
        measured = ", ".join(f"{wire} {seconds * 1e3:.2f} ms" for wire, seconds in self._seconds.items())
        return {"kind": "mpi", "inter": self.inter, "measured": measured, "window": f"{self.window} bytes"}

    def measure(self, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        return self._measure(self.inter, nbytes, others, rounds, turns)

    def _measure(self, wire: str, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        world, pattern = self.cluster.world, probe(self.nodes, nbytes, others, turns)
        exchange = MpiExchange(self, pattern, wire)
        best = float("inf")
        for _ in range(rounds):
            world.barrier("the measurement of the links")
            start = time.perf_counter()
            exchange.begin()
            exchange.signal(Place(self.rank, 0))
            for transfer in pattern.transfers:
                if transfer.target.rank == self.rank:
                    exchange.wait(transfer.target)
            exchange.quiet()
            best = min(best, world.largest(time.perf_counter() - start, "the measurement of the links"))
        exchange.close()
        return best

"""One-sided transfers between GPUs: NVSHMEM puts on CUDA streams, which copy engines carry out while the SMs compute.

A block goes into the reader's memory as soon as it is written, by a put that sets the block's signal in the reader's
memory when all of it is there. Streams stand beside the current one, which computes: `puts`, in the order in which
blocks are signalled; `arrivals`, which waits for what is to be sent on (a ring), and `forwards`, which sends it. For
all else the current stream waits itself. A round forks them from it and joins them to it at its end, and contains
neither allocations nor, where it is captured, waits of the host: any number of rounds fit a CUDA graph.

**Two sets and no barrier.** At the end of a round a rank has all that was sent to it, and clears that set's signals on
the stream that computes, before it publishes the next round. In attention, and where all is gathered, a rank's round
cannot end before it has had something of *every* rank, directly or by way of others, that was published in that round.
So whoever has ended round n + 1 knows that all have published it, hence have ended round n, hence have read and cleared
its set; all that n sent is where it belongs. Round n + 2 may then write to that set. This needs nothing but that rounds
which follow each other use different sets. (A pattern in which not everybody hears of everybody, as the probe of three
nodes, needs a barrier, with the devices at rest, between its rounds.)

In a CUDA graph sets and signals are constants: a signal is waited for as >= 1 and cleared, as above, and nothing counts
rounds. But of an odd number of captured rounds, or after an odd number of others in between, two that follow each other
may use the same set. So a capture begins and ends with a meeting: each rank signals each, and waits for all. The two
meetings have signals of their own, by turns, for the reason for which there are two sets.

**Who waits.** A signal that is waited for on a stream may be a kernel that spins, and until it ends whatever
synchronises the device waits as well: the first call of a kernel (CUDA loads it then; Programming Guide, Lazy Loading,
Concurrent Execution), compilation, tuning, a full memory pool. If that happens on two ranks that wait for each other's
next block, it is a deadlock. So in rounds outside a graph the host looks at the signals, and only what has arrived is
waited for on a stream; it also finds out who is gone.
"""

import math
import time
from typing import TYPE_CHECKING

import torch

from ..errors import BrokenRun
from .base import Exchange, Pattern, Place, Transfer
from .heap import ALIGN

if TYPE_CHECKING:
    from .nvshmem import NvshmemTransport

LOOK_S = 1.0  # for a copy of the signals to the host
SETTING_UP, ENDING = "the buffers of a video shape", "the end of a video shape"


class NvshmemExchange(Exchange):
    """Blocks in symmetric memory, each with a signal that its sender sets."""

    def __init__(self, transport: "NvshmemTransport", pattern: Pattern) -> None:
        """Collective over the group. Raises BrokenRun on all its ranks where the heap has no room."""
        self.transport, self._pattern, self._heap = transport, pattern, transport.heap
        self._world, size = transport.cluster.world, transport.size
        longest = max(pattern.elements(rank) for rank in range(size)) * pattern.dtype.itemsize
        stride, blocks = -(-longest // ALIGN) * ALIGN, max(map(len, pattern.spans)) + 1
        nbytes = self.SETS * stride + -(-8 * (self.SETS * blocks + 2 * size) // ALIGN) * ALIGN
        self._at = self._room(nbytes)
        own = self._heap.take(self._at, nbytes)
        self._base, self._stride = own.data_ptr(), stride
        mine = pattern.elements(self._world.rank) * pattern.dtype.itemsize
        self._sets = [own[s * stride : s * stride + mine].view(pattern.dtype) for s in range(self.SETS)]
        words = own[self.SETS * stride :].view(torch.int64).zero_()
        # [set, block]; after those of the blocks one that says that the set's round is under way.
        self._signals = words[: self.SETS * blocks].view(self.SETS, blocks)
        self._meetings = words[self.SETS * blocks :][: 2 * size].view(2, size)
        self._seen = torch.empty(self.SETS, blocks, dtype=torch.int64, pin_memory=True)
        self._looked, self._opened = torch.cuda.Event(), torch.cuda.Event()
        self._onward: dict[Place, list[Transfer]] = {}
        for t in pattern.transfers:
            if t.source.rank == transport.rank:
                self._onward.setdefault(t.source, []).append(t)
        self._from = {t.target: t.source.rank for t in pattern.transfers if t.target.rank == transport.rank}
        self._ready = {place: torch.cuda.Event() for place in {**self._from, **self._onward}}
        self._late: dict[Place, int] = {}  # inbound blocks of this round that no stream waits for yet
        self._round, self._which, self._captured = 0, 0, False
        torch.cuda.current_stream().synchronize()
        self._world.barrier(SETTING_UP)  # signals are zero everywhere

    def _room(self, nbytes: int) -> int:
        """The first offset at which all ranks of the group have room, whatever other groups each was in."""
        least = 0.0
        while True:
            mine = self._heap.fit(nbytes, int(least))
            if math.isinf(least := self._world.largest(mine, SETTING_UP)):
                raise BrokenRun(
                    f"the symmetric heap of {self._heap.nbytes} bytes has no room for {nbytes} more"
                    f" ({self._heap.free()} are free on rank {self._world.members[self._world.rank]})"
                )
            if -self._world.largest(-mine, SETTING_UP) == least:
                return int(least)

    def memory(self, rank: int, which: int) -> torch.Tensor | None:
        return self._sets[which] if rank == self.transport.rank else None

    def begin(self) -> int:
        capturing = torch.cuda.is_current_stream_capturing()
        self._round += 1
        self._which = self._round % self.SETS
        if capturing and not self._captured:
            self._meet(0)
        self._captured = capturing
        self._signals[self._which, -1].fill_(1)
        self._opened.record()
        for stream in self._heap.beside:
            stream.wait_stream(torch.cuda.current_stream())
        self._late = dict(self._from)
        return self._which

    def signal(self, place: Place) -> None:
        if place in self._onward:
            self._ready[place].record()
            self._send(place, self._heap.puts)

    def _send(self, place: Place, stream: torch.cuda.Stream) -> None:
        """Block `place` leaves on `stream` once it is ready."""
        stream.wait_event(self._ready[place])
        nodes = self.transport.nodes
        nbytes, source = self._pattern.nbytes(place), self._address(place)
        for t in self._onward[place]:
            signal, pe = self._signal(t.target.block), self._world.members[t.target.rank]
            if nodes[t.target.rank] == nodes[place.rank]:
                self.transport.traffic.intra += nbytes
            else:
                self.transport.traffic.inter += nbytes
            self._heap.put(self._address(t.target), source, nbytes, signal, pe, stream.cuda_stream)

    def _address(self, place: Place) -> int:
        offset = self._pattern.spans[place.rank][place.block][0] * self._pattern.dtype.itemsize
        return self._base + self._which * self._stride + offset

    def _signal(self, block: int) -> int:
        return self._signals.data_ptr() + 8 * (self._which * self._signals.shape[1] + block)

    def wait(self, place: Place) -> None:
        """As Exchange.wait, for the current stream; in rounds that are captured await_stream raises."""
        if place in self._late and self._captured:
            self._expect(place)
        elif place in self._late:
            what = f"{self._name(place)}, layer {self._round}"
            self._world.wait(lambda: self._look(place), [self._late[place]], what)
        if place in self._from and place in self._onward:
            torch.cuda.current_stream().wait_event(self._ready[place])

    def _expect(self, place: Place) -> None:
        """The current stream waits for an inbound block. If it goes on, `arrivals` does, and `forwards` sends it.

        A wait that is a kernel takes an SM from attention: on the stream that computes there is none beside it.
        """
        del self._late[place]
        heap, onward = self._heap, place in self._onward
        stream = heap.arrivals if onward else torch.cuda.current_stream()
        heap.wait(self._signal(place.block), self._world.members[self._from[place]], stream.cuda_stream)
        if onward:
            self._ready[place].record(stream)
            self._send(place, heap.forwards)

    def _look(self, place: Place) -> bool:
        """Whether `place` has arrived; all that have may be read and go on."""
        # Before the device has begun this round there are signals of the set's last one.
        if self._opened.query() and (seen := self._flags()) is not None:
            for late in [late for late in self._late if seen[self._which][late.block]]:
                self._expect(late)
        return place not in self._late

    def _flags(self) -> list[list[int]] | None:
        """The signals as they are now, whatever the other streams wait for; None if the device does not answer."""
        with torch.cuda.stream(self._heap.looks):
            self._seen.copy_(self._signals, non_blocking=True)
            self._looked.record()
        end = time.monotonic() + LOOK_S
        while not self._looked.query():
            if time.monotonic() > end:
                return None
        return list(self._seen.tolist())

    def missing(self) -> list[str]:
        """The names of the blocks that the round under way on the device lacks, as far as that can be found out."""
        rows = [row for row in self._flags() or [] if row[-1]]
        return [self._name(place) for row in rows for place in self._from if not row[place.block]]

    def _name(self, place: Place) -> str:
        return f"{self._pattern.names[place.rank][place.block]}, from rank {self._world.members[self._from[place]]}"

    def quiet(self) -> None:
        """As Exchange.quiet, for the current stream: it waits for all streams of the round, and clears its signals."""
        for place in [*self._late]:
            self.wait(place)
        for stream in self._heap.beside:
            torch.cuda.current_stream().wait_stream(stream)
        self._signals[self._which].zero_()

    def settle(self) -> None:
        """The end of the rounds of a capture, if there is one."""
        if self._captured:
            self._meet(1)
            self._captured = False

    def _meet(self, number: int) -> None:
        """The current stream goes on when every rank's has come here. number: 0 and 1 by turns."""
        heap, stream, me = self._heap, torch.cuda.current_stream().cuda_stream, self.transport.rank
        signals, members = self._meetings[number].data_ptr(), self._world.members
        others = [(me + i) % len(members) for i in range(1, len(members))]
        for other in others:
            heap.signal(signals + 8 * me, members[other], stream)
        for other in others:
            heap.wait(signals + 8 * other, members[other], stream)
        self._meetings[number].zero_()

    def close(self) -> None:
        self.transport.await_stream(ENDING)
        self._world.barrier(ENDING)
        self.transport.exchanges.remove(self)
        self._sets = []
        self._heap.give(self._at)

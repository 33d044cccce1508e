"""Runs all ranks' schedules of one attention layer on a cost model: an event simulation.

A rank computes one step after the other; what leaves it goes in the schedule's order, one transfer at a time or a few,
and all that leaves or enters a node shares that node's link. Ranks that a shift of the mesh maps onto each other, nodes
and all, do the same at the same time: of each class only one is simulated.
"""

import heapq
from collections.abc import Sequence
from math import inf

from ..attention.schedule import Attend, Piece, Pull, Push, Schedule, Shape, Step, publishing
from ..mesh import cut
from .costs import Costs
from .flows import Flow, Network
from .symmetry import Symmetry
from .timeline import Span, Timeline


def simulate(schedule: Schedule, shape: Shape, nodes: Sequence[int], costs: Costs, itemsize: int) -> Timeline:
    """The timeline of one attention layer of `shape`, numbers of `itemsize` bytes, on ranks that lie on `nodes`."""
    return _Run(schedule, shape, tuple(nodes), costs, itemsize).timeline()


class _Run:
    def __init__(self, schedule: Schedule, shape: Shape, nodes: tuple[int, ...], costs: Costs, itemsize: int) -> None:
        self.schedule, self.shape, self.nodes, self.costs, self.itemsize = schedule, shape, nodes, costs, itemsize
        self.symmetry = Symmetry(schedule, shape, nodes)
        self.ranks = range(self.symmetry.period)
        size, ulysses = schedule.mesh.size, schedule.mesh.extent("ulysses")
        if self.symmetry.period < size and not self.symmetry.even:
            self.tokens = [-(-shape.length // size)] * size
            heads = cut(-(-shape.heads // ulysses), schedule.groups)
            self.heads = [len(heads[slot % schedule.groups]) for slot in range(schedule.slots)]
        else:
            self.tokens = [len(part) for part in cut(shape.length, size)]
            self.heads = [len(part) for part in schedule.heads(shape.heads)]
        self.steps: list[Sequence[Step]] = [schedule.ranks[rank] for rank in self.ranks]
        self.position = [0] * len(self.ranks)
        self.busy_s = [0.0] * len(self.ranks)  # attention calls
        # Parts of each rank's o that other ranks make.
        self.missing = [schedule.slots - schedule.groups] * len(self.ranks)
        self.ended = [inf] * len(self.ranks)
        self.there: set[tuple[int, Piece]] = set()  # readable in the memory of the rank
        self.waiting: dict[tuple[int, Piece], list[int]] = {}
        self.spaces = costs.spaces(nodes)
        self.network = Network(nodes, costs, max(nodes.count(node) for node in set(nodes[: self.symmetry.period])))
        self.working: dict[int, float] = {}  # what is left of a rank's present step, seconds with all of its speed
        self.started = [0.0] * len(self.ranks)  # the present step
        self.events: list[tuple[float, int, int, Piece | None]] = []
        self.number, self.now = 0, 0.0
        self.met: set[tuple[int, int, int]] = set()
        self.spans: list[Span] = []
        self.inter = self.intra = 0
        self._holders: dict[tuple[int, Piece], int] = {}
        self._plan_transfers()

    def nbytes(self, piece: Piece) -> int:
        shape = self.shape
        return shape.batch * self.tokens[piece.tokens] * self.heads[piece.heads] * shape.dim * self.itemsize

    def holder(self, rank: int, piece: Piece) -> int:
        """The rank in whose memory `rank` finds `piece`: schedule.holder, by way of the ranks that are simulated."""
        if piece.tokens == rank:
            return rank
        key = self.symmetry.of(rank, piece)
        if key not in self._holders:
            holder = self.holder(self.schedule.sources[key[0]][key[1]], key[1])
            self._holders[key] = holder if self.spaces[holder] == self.spaces[key[0]] else key[0]
        return (self._holders[key] + rank - key[0]) % self.symmetry.size

    def _plan_transfers(self) -> None:
        """Every transfer into a simulated rank, as one out of the rank that stands for its source."""
        for at in range(max(map(len, self.steps), default=0)):  # side by side: a ring's holders are found hop by hop
            for rank in self.ranks:
                step = self.steps[rank][at] if at < len(self.steps[rank]) else None
                if isinstance(step, Pull):
                    if self.holder(rank, step.piece) == rank:
                        holder = self.holder(step.source, step.piece)
                        source, piece = self.symmetry.of(holder, step.piece)
                        self._flow(Flow((0, at), source, piece, rank, step.piece, self.nbytes(piece)), holder, rank)
                    else:
                        self.intra += self.nbytes(step.piece)
                elif isinstance(step, Push):
                    home, there = self.symmetry.of(step.home, step.piece)
                    if self.spaces[step.home] != self.spaces[rank]:
                        size = self.nbytes(step.piece)
                        self._flow(Flow((1, at), rank, step.piece, home, there, size), rank, step.home)
                    else:
                        self.intra += self.nbytes(step.piece)

    def _flow(self, flow: Flow, source: int, target: int) -> None:
        if self.nodes[source] != self.nodes[target]:
            self.inter += flow.nbytes
        else:
            self.intra += flow.nbytes
        self.network.add(flow, self.nodes[source], self.nodes[target])

    # Events

    def at(self, time: float, rank: int, piece: Piece | None = None) -> None:
        """At `time` `piece` is readable in the memory of `rank`; without one, the rank goes on with its steps."""
        self.number += 1
        heapq.heappush(self.events, (time, self.number, rank, piece))

    def timeline(self) -> Timeline:
        for rank in self.ranks:
            self._publish(rank)
        while self.events or self.network.under_way or self.working:
            self._advance()
        assert max(self.ended) < inf, "the schedule does not end"
        share = self.symmetry.size // len(self.ranks)
        return Timeline(max(self.ended), max(self.busy_s), self.inter * share, self.intra * share, self.spans)

    def _advance(self) -> None:
        """On to the next moment at which a flow or a step ends or something else happens."""
        flows, rates, speeds = self.network.under_way, self.network.rates(), self._speeds()
        ends = [self.now + flow.left / rate for flow, rate in zip(flows, rates, strict=True)]
        steps = {rank: self.now + left / speeds[rank] for rank, left in self.working.items()}
        time = min((*ends, *steps.values(), self.events[0][0] if self.events else inf))
        gone = [flow for flow, end in zip(flows, ends, strict=True) if end <= time + 1e-12]
        for flow, rate in zip(flows, rates, strict=True):
            flow.left -= rate * (time - self.now)
        for rank in steps:
            self.working[rank] -= speeds[rank] * (time - self.now)
        self.now = time
        for flow in gone:
            self._gone(flow)
        if self.events and self.events[0][0] <= time:
            _, _, rank, piece = heapq.heappop(self.events)
            if piece is None:
                self._run(rank)
            else:
                self._arrive(rank, piece)
        for rank, end in steps.items():
            if end <= time + 1e-12:
                del self.working[rank]
                self._done(rank)

    def _speeds(self) -> dict[int, float]:
        """Of each rank that works at a step: all, or what its node's transfers leave."""
        busy = self.network.busy() if self.costs.overlap < 1 else ()
        return {rank: self.costs.overlap if self.spaces[rank] in busy else 1.0 for rank in self.working}

    def _publish(self, rank: int) -> None:
        """v, k and q become readable one after the other, and the first step follows."""
        time = 0.0
        leaving = (piece for piece in self.network.leaving(rank) if piece.tokens == rank)
        tensors, slots = publishing(leaving, self.schedule.own(rank), self.schedule.slots)
        for tensor in tensors:
            for slot in slots:
                piece = Piece(tensor, rank, slot)
                time += self.costs.copy(self.nbytes(piece))
                self.at(time, rank, piece)
        self.at(time, rank)

    def _arrive(self, rank: int, piece: Piece) -> None:
        if piece.tensor == "o" and piece.tokens == rank:
            self.missing[rank] -= 1
            self._maybe_end(rank)
            return
        self.there.add((rank, piece))
        self.network.ready(rank, piece, self.now)
        for waiter in self.waiting.pop((rank, piece), ()):
            self.at(self.now, waiter)

    def _gone(self, flow: Flow) -> None:
        self.network.gone(flow, self.now)
        lane, link = ("inter", self.costs.inter) if flow.far else ("intra", self.costs.intra)
        self.spans.append(Span(flow.source, lane, flow.piece.tensor, flow.start, self.now))
        self.at(self.now + link.latency_s, flow.target, flow.there)

    # Steps

    def _run(self, rank: int) -> None:
        """Goes on with a rank's steps until one has to wait, or takes time."""
        while self.position[rank] < len(self.steps[rank]):
            step, self.started[rank] = self.steps[rank][self.position[rank]], self.now
            if isinstance(step, Pull):
                place = self._found(rank, step)
                if place not in self.there:
                    self.waiting.setdefault(place, []).append(rank)
                    return
                self.there.add((rank, step.piece))
                seconds = 0.0
                if place != (rank, step.piece):
                    seconds = self.costs.intra.latency_s + self.nbytes(step.piece) / self.costs.intra.bytes_per_s
            elif isinstance(step, Attend):
                seconds = self._attend(rank, step)
            else:
                seconds = self.costs.copy(self.nbytes(step.piece))
            if seconds:
                self.working[rank] = seconds
                return
            self._end(rank, step)
        self._maybe_end(rank)

    def _done(self, rank: int) -> None:
        self._end(rank, self.steps[rank][self.position[rank]])
        self._run(rank)

    def _found(self, rank: int, step: Pull) -> tuple[int, Piece]:
        """Where `rank` finds the piece that it pulls."""
        return self.symmetry.of(self.holder(rank, step.piece), step.piece)

    def _end(self, rank: int, step: Step) -> None:
        """What follows from a step that has ended."""
        start = self.started[rank]
        self.position[rank] += 1
        if isinstance(step, Attend):
            self.spans.append(Span(rank, "compute", "attend", start, self.now))
        elif isinstance(step, Pull):
            if self._found(rank, step) != (rank, step.piece):
                self.spans.append(Span(rank, "intra", step.piece.tensor, start, self.now))
            for waiter in self.waiting.pop((rank, step.piece), ()):
                self.at(self.now, waiter)
        elif self.spaces[step.home] != self.spaces[rank]:
            self._arrive(rank, step.piece)  # in its staging block, from where it leaves
        else:
            home, there = self.symmetry.of(step.home, step.piece)
            self.at(self.now + self.costs.intra.latency_s, home, there)
            self.spans.append(Span(rank, "intra", "o", start, self.now))

    def _attend(self, rank: int, step: Attend) -> float:
        shape, heads = self.shape, self.heads[step.heads]
        queries, keys = (sum(self.tokens[who] for who in group) for group in (step.q, step.kv))
        seconds = self.costs.attend(queries, keys, heads, shape.batch, shape.dim)
        self.busy_s[rank] += seconds
        for who in step.q:
            if (rank, who, step.heads) in self.met:  # a merge reads two results and writes one
                seconds += self.costs.copy(3 * self.nbytes(Piece("o", who, step.heads)))
            self.met.add((rank, who, step.heads))
        return seconds

    def _maybe_end(self, rank: int) -> None:
        """A rank has its layer when its steps are done and every part of its o has come home and been put together."""
        if self.position[rank] == len(self.steps[rank]) and self.missing[rank] == 0:
            whole = sum(self.nbytes(Piece("o", rank, slot)) for slot in range(self.schedule.slots))
            self.ended[rank] = self.now + self.costs.copy(whole)

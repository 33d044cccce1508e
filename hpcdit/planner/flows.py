"""Transfers in a simulation: what leaves a rank goes in order, and links are shared."""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.schedule import Piece
from .costs import Costs


@dataclass
class Flow:
    """A transfer of `left` bytes yet: `piece` at rank `source` goes to `target`, where it arrives as `there`."""

    order: tuple[int, int]
    source: int
    piece: Piece
    target: int
    there: Piece
    nbytes: int
    left: float = 0.0
    start: float = 0.0
    far: bool = True  # between nodes


class Network:
    """All flows. Of what is readable in a rank's memory the first in order leaves first, one flow at a time or a few.

    per_node: ranks of a node.
    """

    def __init__(self, nodes: Sequence[int], costs: Costs, per_node: int) -> None:
        self.nodes, self.costs, self.spaces = nodes, costs, costs.spaces(nodes)
        self.under_way: list[Flow] = []
        self._window = 2 * costs.inter.latency_s * costs.inter.bytes_per_s / per_node
        self._outward: dict[int, dict[Piece, list[Flow]]] = {}
        self._queue: dict[int, list[tuple[tuple[int, int], int, Flow]]] = {}
        self._sending: dict[int, int] = {}  # bytes under way
        self._ways = set[int]()  # how many nodes on the targets are
        self._number = 0

    def add(self, flow: Flow, node: int, to: int) -> None:
        """node, to: between which it goes; its own ranks may stand for others."""
        self._outward.setdefault(flow.source, {}).setdefault(flow.piece, []).append(flow)
        flow.far = node != to
        if flow.far:
            self._ways.add((to - node) % (self.nodes[-1] + 1))

    def leaving(self, rank: int) -> list[Piece]:
        """The pieces that leave `rank`, in order."""
        flows = [flow for flows in self._outward.get(rank, {}).values() for flow in flows]
        return [flow.piece for flow in sorted(flows, key=lambda flow: flow.order)]

    def ready(self, rank: int, piece: Piece, now: float) -> None:
        """`piece` is readable in the memory of `rank`."""
        for flow in self._outward.get(rank, {}).get(piece, ()):
            flow.left, flow.start = flow.nbytes, now
            self._wait(flow)
        self._give_way(rank)
        self._fill(rank, now)

    def _wait(self, flow: Flow) -> None:
        self._number += 1
        heapq.heappush(self._queue.setdefault(flow.source, []), (flow.order, self._number, flow))

    def _give_way(self, rank: int) -> None:
        """What is wanted later than the first that waits pauses: blocks travel in parts."""
        queue = self._queue.get(rank)
        for flow in [flow for flow in self.under_way if queue and flow.source == rank and flow.order > queue[0][0]]:
            self.under_way.remove(flow)
            self._sending[rank] -= flow.nbytes
            self._wait(flow)

    def rates(self) -> list[float]:
        """Bytes a second of each flow: its share of its source's link or of its target's, whichever is less.

        Between nodes the ranks of a node share one, inside a node each rank has its own.
        """
        out, into = Counter[tuple[bool, int]](), Counter[tuple[bool, int]]()
        ends = [tuple((f.far, self.nodes[r] if f.far else r) for r in (f.source, f.target)) for f in self.under_way]
        for source, target in ends:
            out[source] += 1
            into[target] += 1
        far = self.costs.inter.bytes_per_s * (self.costs.spread if len(self._ways) > 1 else 1.0)
        rates = {True: far, False: self.costs.intra.bytes_per_s}
        return [rates[source[0]] / max(out[source], into[target]) for source, target in ends]

    def busy(self) -> set[int]:
        """Where something is sent or comes in: of Costs.spaces."""
        return {self.spaces[rank] for flow in self.under_way for rank in (flow.source, flow.target)}

    def gone(self, flow: Flow, now: float) -> None:
        """All of `flow` has left its rank."""
        self.under_way.remove(flow)
        self._sending[flow.source] -= flow.nbytes
        self._fill(flow.source, now)

    def _fill(self, rank: int, now: float) -> None:
        queue = self._queue.get(rank)
        while queue and self._sending.get(rank, 0) < max(self._window, 1):
            _, _, flow = heapq.heappop(queue)
            if flow.left == flow.nbytes:
                flow.start = now
            self._sending[rank] = self._sending.get(rank, 0) + flow.nbytes
            self.under_way.append(flow)

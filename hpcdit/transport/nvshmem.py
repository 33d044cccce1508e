"""The transport between GPUs: NVSHMEM's symmetric memory, in which `nvshmem_exchange` moves blocks."""

import math
from collections.abc import Sequence

import torch

from ..cluster import Cluster
from ..errors import PeerLost
from .base import Pattern, Place, Transfer, Transport, probe
from .heap import current
from .heap import finish as finish
from .heap import start as start
from .nvshmem_exchange import NvshmemExchange

MEASURING = "the measurement of the links"
ROUNDS = 4  # that are measured together; even, see nvshmem_exchange


class NvshmemTransport(Transport):
    """NVSHMEM between the GPUs of all ranks of `cluster`; after `start`.

    `traffic` counts what is captured once: who replays it counts that.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(rank=cluster.world.rank, nodes=cluster.nodes)
        self.cluster, self.heap = cluster, current()
        self.exchanges = list[NvshmemExchange]()

    @property
    def spaces(self) -> Sequence[int]:
        """Each rank's memory is its own: kernels that read a peer's would take SMs, puts take none."""
        return tuple(range(self.size))

    @property
    def streams(self) -> bool:
        return True

    def exchange(self, pattern: Pattern) -> NvshmemExchange:
        self.exchanges.append(NvshmemExchange(self, pattern))
        return self.exchanges[-1]

    def join(self) -> None:
        """As Transport.join; to be called last in whatever is captured."""
        for exchange in self.exchanges:
            exchange.settle()

    def await_stream(self, what: str, peers: Sequence[int] | None = None) -> None:
        """Returns when all is done that the current stream was given.

        peers: whom to watch meanwhile, all where left out. Raises PeerLost naming one that is gone, and the piece that
        is missing.
        """
        event = torch.cuda.Event()
        event.record()
        try:
            self.cluster.world.wait(event.query, range(self.size) if peers is None else peers, what)
        except PeerLost as error:
            missing = [name for exchange in self.exchanges for name in exchange.missing()]
            raise PeerLost(f"{missing[0]} has not arrived: {error}" if missing else str(error)) from error

    def describe(self) -> dict[str, str]:
        return {"kind": "nvshmem", "inter": "puts", **self.heap.describe()}

    def measure(self, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        """As Transport.measure, in a graph, as passes are; with `others` = 0 to the next rank of the own node."""
        world, best = self.cluster.world, math.inf
        pattern = probe(self.nodes, nbytes, others, turns) if others else _beside(self.nodes, nbytes)
        exchange, first, last = self.exchange(pattern), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        pairs = {(t.source.rank, t.target.rank) for t in pattern.transfers}
        mutual = all((target, source) in pairs for source, target in pairs)

        def turn() -> None:
            exchange.begin()
            exchange.signal(Place(self.rank, 0))
            exchange.quiet()

        for _ in range(exchange.SETS):  # by then all kernels of a round have run
            turn()
            self.await_stream(MEASURING)
            world.barrier(MEASURING)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            for _ in range(ROUNDS):
                turn()
                if not mutual:  # whom one hears of may not have heard of one
                    self.join()
            self.join()
        for _ in range(1 + rounds):
            world.barrier(MEASURING)
            first.record()
            graph.replay()
            last.record()
            self.await_stream(MEASURING)
            best = min(best, world.largest(first.elapsed_time(last) / 1e3 / ROUNDS, MEASURING))
        exchange.close()
        return best


def _beside(nodes: Sequence[int], nbytes: int) -> Pattern:
    """As probe, to the next rank of the own node, where there is one."""
    transfers = []
    for rank, node in enumerate(nodes):
        mates = [mate for mate, other in enumerate(nodes) if other == node]
        if len(mates) > 1:
            transfers.append(Transfer(Place(rank, 0), Place(mates[(mates.index(rank) + 1) % len(mates)], 1)))
    spans, names = (((0, nbytes), (nbytes, nbytes)),) * len(nodes), (("a block that is measured",) * 2,) * len(nodes)
    return Pattern(torch.uint8, spans, tuple(transfers), names)

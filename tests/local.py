"""A transport between threads of one process: the executor's other side in tests, with nodes that share no memory."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hpcdit.transport.base import Exchange, Pattern, Place, Transport


class Board:
    """What the threads of a group share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=5)
        self.changed = threading.Condition()
        self.exchanges: dict[tuple[int, int], LocalExchange] = {}
        self.failed = False

    def fail(self) -> None:
        """One rank has failed: the others stop waiting for it."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()
        self.barrier.abort()


class LocalExchange(Exchange):
    def __init__(self, transport: "LocalTransport", pattern: Pattern, number: int) -> None:
        self.transport, self.pattern, self.number = transport, pattern, number
        size = pattern.elements(transport.rank)
        fill = float("nan") if pattern.dtype.is_floating_point else 0
        self.sets = [torch.full((size,), fill, dtype=pattern.dtype) for _ in range(self.SETS)]
        self.counts = [0] * len(pattern.spans[transport.rank])
        self.round = 0
        transport.board.exchanges[number, transport.rank] = self
        transport.board.barrier.wait()

    def peer(self, rank: int) -> "LocalExchange":
        return self.transport.board.exchanges[self.number, rank]

    def memory(self, rank: int, which: int) -> torch.Tensor | None:
        near = self.transport.spaces[rank] == self.transport.spaces[self.transport.rank]
        return self.peer(rank).sets[which] if near else None

    def begin(self) -> int:
        self.round += 1
        return self.round % self.SETS

    def signal(self, place: Place) -> None:
        assert self.memory(place.rank, 0) is not None, "only an addressable block can be signalled"
        with self.transport.board.changed:
            self._arrive(place, self.round)
            self.transport.board.changed.notify_all()

    def _arrive(self, place: Place, number: int) -> None:
        self.peer(place.rank).counts[place.block] = number
        for t in self.pattern.transfers:
            if t.source == place:
                (a, n), (b, m) = (self.pattern.spans[p.rank][p.block] for p in (t.source, t.target))
                assert n == m, "both ends of a transfer are of one size"
                here, there = self.peer(t.source.rank), self.peer(t.target.rank)
                which = number % self.SETS
                there.sets[which][b : b + n] = here.sets[which][a : a + n]
                self.transport.traffic.inter += self.pattern.nbytes(place)
                self._arrive(t.target, number)

    def wait(self, place: Place) -> None:
        assert self.memory(place.rank, 0) is not None, "only an addressable block can be waited for"
        peer = self.peer(place.rank)
        with self.transport.board.changed:
            board = self.transport.board
            board.changed.wait_for(lambda: board.failed or peer.counts[place.block] >= self.round, timeout=5)
            assert peer.counts[place.block] >= self.round, (
                f"rank {self.transport.rank} waits in vain for {self.pattern.names[place.rank][place.block]}"
            )

    def quiet(self) -> None: ...

    def close(self) -> None:
        self.transport.board.barrier.wait()


class LocalTransport(Transport):
    def __init__(self, rank: int, nodes: Sequence[int], board: Board, apart: bool) -> None:
        super().__init__(rank=rank, nodes=nodes)
        self.board, self.apart, self._made = board, apart, 0

    @property
    def spaces(self) -> Sequence[int]:
        return range(self.size) if self.apart else self.nodes

    def measure(self, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        raise NotImplementedError("threads have no links")

    def exchange(self, pattern: Pattern) -> LocalExchange:
        self._made += 1
        return LocalExchange(self, pattern, self._made)

    def describe(self) -> dict[str, str]:
        return {"kind": "threads"}


def on_ranks(nodes: Sequence[int], body: Callable[[LocalTransport], Any], apart: bool = False) -> list[Any]:
    """Runs `body` on a thread a rank; the results by rank, or the first failure.

    apart: no rank reads another's memory in place, be it on its own node, as GPUs do not.
    """
    board = Board(len(nodes))
    errors: list[BaseException] = []

    def rank_body(rank: int) -> Any:
        try:
            return body(LocalTransport(rank, nodes, board, apart))
        except BaseException as error:
            errors.append(error)
            board.fail()
            return None

    with ThreadPoolExecutor(len(nodes)) as pool:
        results = list(pool.map(rank_body, range(len(nodes))))
    if errors:
        raise errors[0]
    return results

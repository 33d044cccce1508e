"""One-sided communication: what the attention executor asks of a transport.

A schedule is static, so all transfers of a layer are known in advance. They are given once, as a `Pattern`, and
replayed round after round (a round is a layer): memory is divided into blocks, `signal` says that a block is written,
`wait` returns when a block is readable. Nobody receives: whether a transfer is the owner's put, the reader's get, or
nothing at all because the reader addresses the owner's memory, is the transport's choice.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, order=True)
class Place:
    """Block number `block` in the symmetric memory of `rank`."""

    rank: int
    block: int


@dataclass(frozen=True)
class Transfer:
    """A block that crosses nodes: from the memory it lies in to its copy in the memory of a reader."""

    source: Place
    target: Place


@dataclass(frozen=True)
class Pattern:
    """One layer's memory and transfers, the same object on all ranks.

    spans: for each rank, (offset, count) in elements of each of its blocks.
    transfers: those of the blocks that cross nodes; every other reader reads in place. Where several wait to leave a
        rank, or to be fetched by one, the first of this list goes first.
    names: what a block holds, for messages, by rank and block.
    """

    dtype: torch.dtype
    spans: tuple[tuple[tuple[int, int], ...], ...]
    transfers: tuple[Transfer, ...]
    names: tuple[tuple[str, ...], ...]

    def elements(self, rank: int) -> int:
        """Elements of one buffer set of `rank`."""
        return max((offset + count for offset, count in self.spans[rank]), default=0)

    def nbytes(self, place: Place) -> int:
        return self.spans[place.rank][place.block][1] * self.dtype.itemsize


def probe(nodes: Sequence[int], nbytes: int, others: int = 1, turns: int = 1) -> Pattern:
    """A block of `nbytes` of each rank, copied to a rank of each of the next `others` nodes: to measure links with.

    turns: so many times, by turns.

    nodes: of each rank, in order. Block 0 of a rank is its own, the others are what comes in.
    """
    first = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    count, blocks, transfers = Counter(nodes), [1] * len(nodes), list[Transfer]()
    for i in range(others * turns):
        for rank, node in enumerate(nodes):
            there = (node + 1 + i % others) % len(first)
            target = first[there] + (rank - first[node]) % count[there]
            transfers.append(Transfer(Place(rank, 0), Place(target, blocks[target])))
            blocks[target] += 1
    spans = tuple(tuple((nbytes * block, nbytes) for block in range(count)) for count in blocks)
    names = tuple(("a block that is measured",) * count for count in blocks)
    return Pattern(torch.uint8, spans, tuple(transfers), names)


@dataclass
class Traffic:
    """Bytes moved by this rank, by link class; `intra` counts what is read in place inside a node."""

    intra: int = 0
    inter: int = 0

    def add(self, other: "Traffic") -> None:
        self.intra, self.inter = self.intra + other.intra, self.inter + other.inter

    def take(self) -> "Traffic":
        """What was counted so far; counts from nothing again."""
        taken = Traffic(self.intra, self.inter)
        self.intra = self.inter = 0
        return taken


class Exchange(ABC):
    """A pattern in symmetric memory: two buffer sets that alternate by round, so that no round needs a barrier."""

    SETS = 2

    @abstractmethod
    def memory(self, rank: int, which: int) -> torch.Tensor | None:
        """Buffer set `which` of `rank` as a flat tensor, or None where this process cannot address it."""

    @abstractmethod
    def begin(self) -> int:
        """Begins the next round; returns its buffer set. What the set held two rounds ago is given up."""

    @abstractmethod
    def signal(self, place: Place) -> None:
        """`place` (own, or an addressable peer's) is written: its readers may have it, its transfers start."""

    @abstractmethod
    def wait(self, place: Place) -> None:
        """Returns when `place` (own or addressable) is readable. Raises PeerLost naming rank and piece."""

    @abstractmethod
    def quiet(self) -> None:
        """Returns when this rank's outgoing transfers of the round have left its memory."""

    @abstractmethod
    def close(self) -> None:
        """Frees the memory; collective."""


@dataclass
class Transport(ABC):
    """Where the ranks of a group are, and how they reach each other."""

    rank: int
    nodes: Sequence[int]
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return len(self.nodes)

    @property
    def spaces(self) -> Sequence[int]:
        """For each rank a number that those share who read each other's memory in place."""
        return self.nodes

    @abstractmethod
    def exchange(self, pattern: Pattern) -> Exchange:
        """Sets up `pattern`; collective over the group."""

    @property
    def streams(self) -> bool:
        """Whether rounds are carried out on the device's streams, so that they may be captured in a graph."""
        return False

    def await_stream(self, what: str) -> None:
        """Returns when the device has done what its current stream was given; `what` is for the message of PeerLost."""
        return  # where there are no streams

    def join(self) -> None:
        """The device's current stream waits for all that is under way: the end of a pass that may be captured."""
        return  # where there are no streams

    @abstractmethod
    def measure(self, nbytes: int, others: int = 1, rounds: int = 5, turns: int = 1) -> float:
        """Seconds of the quickest round in which each rank sends a block to each of the next `others` nodes, by turns.

        As the slowest rank sees it, until all that is sent to it is there. Collective.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What was chosen, for the provenance: kind, and the way between nodes with its measured seconds."""

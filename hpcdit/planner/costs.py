"""What links and kernels cost: a few measured numbers, from which times of any size follow."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Link:
    """A link class. latency_s: from a block being written to its first byte; bytes_per_s: in each direction."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Speeds:
    """The numbers of one rank alone.

    attention_flops, matmul_flops: operations a second on large problems. call_s: what a call of the attention kernel
    costs beyond that. lanes: thread blocks that run at once (a GPU's multiprocessors; 1 for a CPU); tile: query tokens
    of one thread block. copy_bytes_per_s: in its own memory. memory_bytes: that it has.
    """

    attention_flops: float
    matmul_flops: float
    call_s: float
    lanes: int
    tile: int
    copy_bytes_per_s: float
    memory_bytes: float

    def attend(self, queries: int, keys: int, heads: int, batch: int, dim: int) -> float:
        """Seconds of one attention call.

        Thread blocks of `tile` queries run in waves of `lanes`, and the last wave costs a whole one: that is the loss
        on small pieces. (On an H100 three calls of Torus at L = 4k, H = 12 take 1.33x one call by this; 1.4x measured.)
        """
        if not queries * keys * heads:
            return 0.0
        waves = ceil(ceil(queries / self.tile) * heads * batch / self.lanes)
        return self.call_s + waves * self.lanes * min(self.tile, queries) * keys * 4 * dim / self.attention_flops

    def copy(self, nbytes: float) -> float:
        """Seconds to write `nbytes` into this rank's own memory, or to read them there."""
        return nbytes / self.copy_bytes_per_s


@dataclass(frozen=True)
class Costs(Speeds):
    """The numbers of one cluster; ranks and nodes are all alike.

    inter: of a node's network, shared by the ranks of that node; intra: of one rank, between ranks of a node. spread:
    the share of inter that is left where a node talks to several others by turns: they do not keep in step, and then
    two send to one while another waits. overlap: the share of a rank's speed that is left while its node sends or
    receives: transfers want cores, or a GPU's multiprocessors and memory. puts: blocks are put into each other's memory
    inside a node too, as between GPUs; else ranks of a node read in place.
    """

    inter: Link
    intra: Link
    spread: float = 1.0
    overlap: float = 1.0
    puts: bool = False

    def spaces(self, nodes: Sequence[int]) -> tuple[int, ...]:
        """Of ranks that lie on `nodes`, who can read each other's memory: those of the same number."""
        return tuple(range(len(nodes))) if self.puts else tuple(nodes)

    def link(self, node: int, other: int) -> Link:
        """What is between two ranks of these nodes."""
        return self.inter if node != other else self.intra

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Costs":
        """What to_dict made."""
        links = {name: Link(**values[name]) for name in ("inter", "intra")}
        return cls(**{**values, **links})

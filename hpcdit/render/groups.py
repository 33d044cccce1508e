"""How the ranks of a run are cut up: replicas that render videos of their own, halves of guidance, sequences."""

from dataclasses import dataclass

import torch

from ..attention.executor import Gather
from ..cluster import Cluster, World
from ..group import Group
from ..mesh import Mesh
from ..output.trace import Trace
from ..spans import Spans
from ..transport import Network


def mesh(ranks: int, replicas: int, cfg: int) -> Mesh:
    """Replicas are outermost: they hardly talk. The halves of guidance do once a step, a sequence in every layer."""
    return Mesh(("replicas", replicas), ("cfg", cfg), ("sequence", ranks // (replicas * cfg)))


@dataclass(frozen=True)
class Groups:
    """This rank's groups. replica: the ranks that share its videos; sequence: those that share a pass of the model.

    cluster: the nodes of the world.
    """

    world: World
    mesh: Mesh
    number: int
    replica: Group
    cluster: Cluster
    sequence: Cluster

    @classmethod
    def cut(cls, world: World, cluster: Cluster, replicas: int, cfg: int) -> "Groups":
        """Collective over the world. cluster: its nodes."""
        replica = world.part(replicas)
        grid = mesh(world.size, replicas, cfg)
        sequence = cluster.part(replica.part(cfg))
        return cls(world, grid, grid.coords(world.rank)["replicas"], replica, cluster, sequence)

    def halves(self, network: Network, trace: Trace) -> "Halves | None":
        """Collective over the replica."""
        return Halves(self, network, trace) if self.mesh.extent("cfg") > 1 else None

    def close(self) -> None:
        """Collective over the replica."""
        self.sequence.close()
        self.sequence.world.close()
        self.replica.close()


class Halves:
    """The two halves of a replica, as a `models.base.Halves`: ranks at the same place of their sequence swap."""

    def __init__(self, groups: Groups, network: Network, trace: Trace) -> None:
        """Collective over the replica."""
        self.index = groups.mesh.coords(groups.world.rank)["cfg"]
        self._pair = groups.cluster.part(groups.replica.across(2))
        self._transport, self._kernels = network.transport(self._pair), network.device.kernels
        self._gathers: dict[tuple[torch.Size, torch.dtype], Gather] = {}
        self.swaps = 0  # that have ended
        self._lane, self._trace = "intra" if self._pair.node_count == 1 else "inter", trace

    def swap(self, mine: torch.Tensor) -> torch.Tensor:
        rows = mine.reshape(1, -1, mine.shape[-1])
        count = rows.shape[1]
        with self._trace.span("exchange cfg", self._lane, mine.nbytes):
            both = self._gather(mine)(rows)
            self._end_swap()
        return both[0, (1 - self.index) * count :][:count].view(mine.shape)

    def _end_swap(self) -> None:
        self._transport.join()
        self.swaps += 1

    def drain(self, junk: torch.Tensor) -> None:
        """Ends the swap at hand, or the next one, for a rank that has nothing to give. junk: like what is swapped."""
        self._gather(junk).drain()
        self._end_swap()

    def _gather(self, mine: torch.Tensor) -> Gather:
        """That for such tensors; of one kind at a time, as videos are."""
        kind = mine.shape, mine.dtype
        if kind not in self._gathers:
            self._end()
            length, width = 2 * mine.numel() // mine.shape[-1], mine.shape[-1]
            unseen = Spans(None, self._trace.now)
            self._gathers[kind] = Gather(1, length, width, self._transport, self._kernels, mine.dtype, unseen)
        return self._gathers[kind]

    def _end(self) -> None:
        for gather in self._gathers.values():
            gather.close()
        self._gathers.clear()

    def close(self) -> None:
        """Collective over the replica."""
        self._end()
        self._pair.close()
        self._pair.world.close()

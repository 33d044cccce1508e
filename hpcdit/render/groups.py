"""How the ranks of a run are cut up: replicas that render videos of their own, halves of guidance, sequences."""

from dataclasses import dataclass

import torch

from ..cluster import Cluster, World
from ..group import Group
from ..mesh import Mesh
from ..output.trace import Trace


def mesh(ranks: int, replicas: int, cfg: int) -> Mesh:
    """Replicas are outermost: they hardly talk. The halves of guidance do once a step, a sequence in every layer."""
    return Mesh(("replicas", replicas), ("cfg", cfg), ("sequence", ranks // (replicas * cfg)))


@dataclass(frozen=True)
class Groups:
    """This rank's groups. replica: the ranks that share its videos; sequence: those that share a pass of the model."""

    world: World
    mesh: Mesh
    number: int
    replica: Group
    sequence: Cluster

    @classmethod
    def cut(cls, world: World, cluster: Cluster, replicas: int, cfg: int) -> "Groups":
        """Collective over the world. cluster: the world's."""
        replica = world.part(replicas)
        grid = mesh(world.size, replicas, cfg)
        return cls(world, grid, grid.coords(world.rank)["replicas"], replica, cluster.part(replica.part(cfg)))

    def halves(self, trace: Trace) -> "Halves | None":
        return Halves(self, trace) if self.mesh.extent("cfg") > 1 else None

    def close(self) -> None:
        """Collective over the replica."""
        self.sequence.close()
        self.sequence.world.close()
        self.replica.close()


class Halves:
    """The two halves of a replica, as a `models.base.Halves`: ranks at the same place of their sequence swap."""

    def __init__(self, groups: Groups, trace: Trace) -> None:
        where = groups.mesh.coords(groups.world.rank)
        self.index = where["cfg"]
        twin = groups.mesh.rank(**{**where, "cfg": 1 - self.index})
        self._group, self._trace = groups.replica, trace
        self._twin = self._group.members.index(twin)
        self._lane = "intra" if self._group.hosts[self._twin] == self._group.hosts[self._group.rank] else "inter"

    def swap(self, mine: torch.Tensor) -> torch.Tensor:
        flat = mine.cpu().contiguous().view(-1).view(torch.uint8)
        with self._trace.span("exchange cfg", self._lane, flat.nbytes):
            theirs = self._group.swap(flat.numpy(), self._twin, "the other half of the guidance")
        return torch.from_numpy(theirs).view(mine.dtype).view(mine.shape).to(mine.device)

"""Which ranks of a schedule do the same at the same time: of each class one stands for all."""

from collections.abc import Sequence
from math import lcm

from ..attention.schedule import Piece, Schedule, Shape

EVERY_RANK = 64  # up to so many ranks of uneven shares are simulated each; above, all get the largest share


class Symmetry:
    """The classes of ranks that do the same: rank r and r + period, as shifts of the mesh that map nodes to nodes."""

    def __init__(self, schedule: Schedule, shape: Shape, nodes: Sequence[int]) -> None:
        self.size, self.mesh, self.groups = schedule.mesh.size, schedule.mesh, schedule.groups
        self.period = self._period(schedule, nodes)
        ulysses = schedule.mesh.extent("ulysses")
        self.even = shape.length % self.size == 0 and shape.heads % ulysses == 0
        if not self.even and self.size <= EVERY_RANK:
            self.period = self.size
        self._ulysses = [self.mesh.coords(rank).get("ulysses", 0) for rank in range(self.size)]

    def _period(self, schedule: Schedule, nodes: Sequence[int]) -> int:
        outer, inner = (*(extent for _, extent in schedule.mesh.axes), 1)[:2] if schedule.mesh.axes else (1, 1)
        count = nodes[-1] + 1
        per_node = self.size // count if count > 1 else 1
        if count > 1 and tuple(nodes) != tuple(rank // per_node for rank in range(self.size)):
            return self.size
        return per_node if outer == 1 else lcm(per_node, inner)

    def of(self, rank: int, piece: Piece) -> tuple[int, Piece]:
        """The rank that stands for `rank`, and the piece that is to it what `piece` is to `rank`."""
        twin = rank % self.period
        if twin == rank:
            return rank, piece
        ulysses = self.mesh.extent("ulysses")
        u, group = divmod(piece.heads, self.groups)
        u = (u + self._ulysses[twin] - self._ulysses[rank]) % ulysses
        return twin, Piece(piece.tensor, (piece.tokens + twin - rank) % self.size, u * self.groups + group)

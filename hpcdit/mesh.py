"""A mesh: ranks as points of a grid with named axes."""

from dataclasses import dataclass
from math import prod


def cut(n: int, parts: int) -> tuple[range, ...]:
    """Cuts `n` items into `parts` consecutive ranges, as evenly as possible: `[i*n//parts, (i+1)*n//parts)`.

    The one way in which tokens, heads and anything else is shared out: no padding, any `n`, any `parts`.
    """
    return tuple(range(i * n // parts, (i + 1) * n // parts) for i in range(parts))


@dataclass(frozen=True)
class Mesh:
    """Ranks `0 .. size-1` on named axes, the outermost (slowest varying) axis first.

    Ranks are numbered node by node, so the outer of two axes lies across nodes and the inner one inside:
    `Mesh(("ulysses", 2), ("ring", 4))` on two nodes of four ranks has its ulysses axis across the nodes.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, *axes: tuple[str, int]) -> None:
        object.__setattr__(self, "axes", tuple(axes))

    @property
    def size(self) -> int:
        return prod(extent for _, extent in self.axes)

    def extent(self, axis: str) -> int:
        """Ranks along `axis`; 1 for an axis that the mesh does not have."""
        return dict(self.axes).get(axis, 1)

    def coords(self, rank: int) -> dict[str, int]:
        """The coordinates of `rank`, by axis name."""
        where = {}
        for name, extent in reversed(self.axes):
            rank, where[name] = divmod(rank, extent)
        return where

    def rank(self, **coords: int) -> int:
        """The rank at `coords`; an axis left out counts as 0, coordinates wrap around."""
        found = 0
        for name, extent in self.axes:
            found = found * extent + coords.get(name, 0) % extent
        return found

"""A parallel attention method is a schedule, and a schedule is data.

A schedule lists, for every rank, the steps by which it comes to its share of one attention layer. The same lists are
checked (`check.check`), counted (`traffic`), priced, drawn and run; a step names *pieces*, never buffers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from ..mesh import Mesh, cut

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Piece:
    """A part of a tensor: the tokens of rank `tokens`, the heads of slot `heads`.

    Heads are cut into ulysses x groups slots; rank coordinate u has slots u * groups .. (u + 1) * groups - 1.
    """

    tensor: str  # q, k, v, o; x for a tensor that is only gathered
    tokens: int
    heads: int

    def __str__(self) -> str:
        return f"{self.tensor} (tokens of rank {self.tokens}, heads {self.heads})"


@dataclass(frozen=True)
class Pull:
    """This rank needs `piece` now; `source` has it by then: its owner, or a ring neighbour that pulled it before."""

    piece: Piece
    source: int


@dataclass(frozen=True)
class Attend:
    """Attends the q pieces to the kv pieces, all of the head slot `heads`, and merges into the partial results."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Push:
    """Sends a finished piece of o to the rank whose tokens it holds."""

    piece: Piece
    home: int


Step = Pull | Attend | Push
Method = Callable[[Mesh, int, range], list[Step]]  # mesh, rank, and the head slots that this rank computes


@dataclass(frozen=True)
class Shape:
    """What one layer attends: `batch` x `length` tokens x `heads` x `dim`."""

    batch: int
    length: int
    heads: int
    dim: int


class Lazy(Sequence[T]):
    """`make(rank)` for each rank, made when it is first asked for: a plan for thousands of ranks looks at a few."""

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self._make, self._count, self._made = make, count, dict[int, T]()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rank: Any) -> Any:
        if not 0 <= rank < self._count:
            raise IndexError(rank)
        if rank not in self._made:
            self._made[rank] = self._make(rank)
        return self._made[rank]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All ranks' steps of one layer on `mesh`; the tokens are cut over ranks, the heads over ulysses x groups slots."""

    name: str
    mesh: Mesh
    ranks: Sequence[tuple[Step, ...]]
    groups: int = 1

    @classmethod
    def of(cls, name: str, method: Method, mesh: Mesh, groups: int = 1) -> "Schedule":
        def steps(rank: int) -> tuple[Step, ...]:
            return tuple(method(mesh, rank, own_slots(mesh, rank, groups)))

        return cls(name, mesh, Lazy(steps, mesh.size), groups)

    @property
    def slots(self) -> int:
        """Into how many slots the heads are cut."""
        return self.mesh.extent("ulysses") * self.groups

    def own(self, rank: int) -> range:
        """The head slots that `rank` computes."""
        return own_slots(self.mesh, rank, self.groups)

    def heads(self, count: int) -> tuple[range, ...]:
        """The heads of each slot: `count` heads cut over the ulysses axis first, each part into its groups."""
        parts = cut(count, self.mesh.extent("ulysses"))
        return tuple(part[g.start : g.stop] for part in parts for g in cut(len(part), self.groups))

    @cached_property
    def sources(self) -> Sequence[dict[Piece, int]]:
        """For every rank: the source of each piece it pulls."""

        def of(rank: int) -> dict[Piece, int]:
            return {step.piece: step.source for step in self.ranks[rank] if isinstance(step, Pull)}

        return Lazy(of, self.mesh.size)

    def holder(self, piece: Piece, reader: int, nodes: Sequence[int]) -> int:
        """The rank in whose memory `reader` finds `piece`: read in place inside a node, else brought over."""
        chain = [reader]
        while chain[-1] != piece.tokens:
            chain.append(self.sources[chain[-1]][piece])
        holder = chain[-1]
        for rank in reversed(chain):
            if nodes[rank] != nodes[holder]:
                holder = rank
        return holder

    def crossings(self, nodes: Sequence[int]) -> list[tuple[int, int, Piece]]:
        """Every (from, to, piece) that crosses nodes, in the order in which they should leave.

        What is pulled goes first, in the order in which its reader wants it; o goes when nothing else waits, since
        whoever still lacks q, k or v cannot compute, while o is wanted at the end only.
        """
        pulls, pushes = [], []
        for rank, steps in enumerate(self.ranks):
            for at, step in enumerate(steps):
                if isinstance(step, Push) and nodes[step.home] != nodes[rank]:
                    pushes.append((at, rank, step.home, step.piece))
                if isinstance(step, Pull) and self.holder(step.piece, rank, nodes) == rank:
                    pulls.append((at, self.holder(step.piece, step.source, nodes), rank, step.piece))
        return [found[1:] for found in (*sorted(pulls), *sorted(pushes))]


def own_slots(mesh: Mesh, rank: int, groups: int) -> range:
    """The head slots that `rank` computes, of all ulysses x groups."""
    u = mesh.coords(rank).get("ulysses", 0)
    return range(u * groups, (u + 1) * groups)


def publishing(leaving: Iterable[Piece], own: range, slots: int) -> tuple[str, list[int]]:
    """(tensors, head slots) of a rank in the order in which it should make its tokens readable.

    What leaves first, first: `leaving` are its pieces that cross nodes, in their order. Else v, k, q, since v is the
    least to compute; of the slots, those `own` to the rank.
    """
    pieces = list(leaving)
    tensors = "".join(dict.fromkeys([*(piece.tensor for piece in pieces), *"vkq"]))
    wanted = dict[int, int]()
    for at, piece in enumerate(pieces):
        wanted.setdefault(piece.heads, at)
    return tensors, sorted(range(slots), key=lambda s: (s not in wanted, wanted.get(s, 0), s not in own, s))


def traffic(schedule: Schedule, shape: Shape, nodes: Sequence[int]) -> dict[str, int]:
    """Elements of one layer that change ranks, all ranks together, by link class: `intra` and `inter` node.

    nodes: the node of each rank.
    """
    tokens, slots = cut(shape.length, schedule.mesh.size), schedule.heads(shape.heads)

    def size(piece: Piece) -> int:
        return shape.batch * len(tokens[piece.tokens]) * len(slots[piece.heads]) * shape.dim

    moved = sum(size(s.piece) for steps in schedule.ranks for s in steps if isinstance(s, Pull | Push))
    inter = sum(size(piece) for _, _, piece in schedule.crossings(nodes))
    return {"intra": moved - inter, "inter": inter}

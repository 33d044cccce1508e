"""The parallel attention methods: each a function of a mesh and a rank that returns that rank's steps.

Ulysses (all-to-all of heads against tokens), Ring (keys and values go round), and their product are one function on
different meshes; which axis lies across nodes makes the difference between USP (arXiv 2405.07719) and TAS, and the
second function is Torus Attention (TAS and Torus: StreamFusion / SwiftFusion, arXiv 2601.20273).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd

from ..errors import InputError
from ..mesh import Mesh, cut
from .schedule import Attend, Method, Piece, Pull, Push, Schedule, Shape, Step

U, R = "ulysses", "ring"


def product(mesh: Mesh, rank: int, slots: range) -> list[Step]:
    """Ulysses x Ring: q, k, v of the ulysses mates for this rank's heads, then each ring member's k, v in turn.

    Head slots follow each other through each hop: while one is attended, the next is on its way (PipeDiT, HCMS: heads
    in a pipeline; on a ring: a hop in parts that are forwarded as they arrive).
    """
    u, r, hops = mesh.coords(rank)[U], mesh.coords(rank)[R], mesh.extent(R)

    def mates(r: int) -> tuple[int, ...]:
        return tuple(mesh.rank(ulysses=u + i, ring=r) for i in range(mesh.extent(U)))

    steps: list[Step] = []
    for hop in range(hops):
        for s in slots:
            if hop:
                neighbour = mesh.rank(ulysses=u, ring=r + 1)
                steps += [Pull(Piece(t, who, s), neighbour) for who in mates(r + hop) for t in "vk"]
            else:
                steps += [Pull(Piece(t, mate, s), mate) for t in "vkq" for mate in mates(r)[1:]]
            steps.append(Attend(mates(r), mates(r + hop), s))
            if hop == hops - 1:
                steps += [Push(Piece("o", mate, s), mate) for mate in mates(r)[1:]]
    return steps


def torus(mesh: Mesh, rank: int, slots: range, pieces: int = 0) -> list[Step]:
    """Torus Attention: own row first; then each remote row's q, k, v as they arrive; o goes home as it is done.

    A row is a ring (inside a node on the TAS mesh); `row(0)` is stationary: it needs no network. The remote rows come
    in `pieces` pieces, 0 for one a row. Of each piece q comes before k and v: fewer bytes for the same work (the paper
    brings all q first; with more than two rows that leaves the device idle when the network is slow).
    """
    u, r, rows = mesh.coords(rank)[U], mesh.coords(rank)[R], mesh.extent(U)
    mates = tuple(mesh.rank(ulysses=u + i, ring=r) for i in range(rows))
    parts = [range(1 + part.start, 1 + part.stop) for part in cut(rows - 1, min(pieces or rows - 1, rows - 1))]

    def row(i: int) -> tuple[int, ...]:
        return tuple(mesh.rank(ulysses=u + i, ring=r + j) for j in range(mesh.extent(R)))

    def from_ring(i: int, s: int) -> list[Step]:
        return [
            Pull(Piece(t, who, s), mesh.rank(ulysses=u, ring=r + j)) for j, who in enumerate(row(i)) if j for t in "vk"
        ]

    steps: list[Step] = []
    for s in slots:  # work for all the time until something arrives
        steps += [*from_ring(0, s), Attend(mates[:1], row(0), s)]
    for s in slots:
        queries, keys, done = [mates[:1]], row(0), mates[:1]
        for part in parts:
            fresh, last = tuple(mates[i] for i in part), part == parts[-1]
            steps += [Pull(Piece("q", mate, s), mate) for mate in fresh]
            if not last:
                steps.append(Attend(fresh, keys, s))
            for i in part:
                steps += [Pull(Piece(t, mates[i], s), mates[i]) for t in "vk"] + from_ring(i, s)
            new = tuple(who for i in part for who in row(i))
            if not last:
                done += fresh
                steps.append(Attend(done, new, s))
            else:  # each o leaves as soon as it is finished; the own one, which stays, is finished meanwhile
                finished = [(fresh, keys + new), *((some, new) for some in queries[1:])]
                for some, against in finished:
                    steps += [Attend(some, against, s), *(Push(Piece("o", mate, s), mate) for mate in some)]
                steps.append(Attend(mates[:1], new, s))
            queries, keys = [*queries, fresh], keys + new
    return steps


def gather(mesh: Mesh, rank: int, slots: range) -> list[Step]:
    """Every rank's tokens on every rank: what a transformer's last layer needs, as pulls alone."""
    others = [(rank + i) % mesh.size for i in range(1, mesh.size)]
    return [Pull(Piece("x", other, 0), other) for other in others]


# Which function a method is, and the order of its axes, outermost (across nodes) first.
METHODS: dict[str, tuple[Method, tuple[str, str]]] = {
    "ulysses": (product, (U, R)),
    "ring": (product, (U, R)),
    "usp": (product, (R, U)),
    "tas": (product, (U, R)),
    "torus": (torus, (U, R)),
}


def degrees(
    method: str, ranks: int, heads: int, ulysses: int | None = None, ring: int | None = None
) -> tuple[int, int]:
    """The (ulysses, ring) degrees of `method` for a group of `ranks`, completing what is not given.

    Where both are free, ulysses and ring follow from the method's name, and the products take the paper's rule
    `ulysses = gcd(ranks, heads)`. Any other degrees whose product is the group are as exact.

    Raises InputError naming the keys when the degrees are impossible.
    """
    fixed = {"ulysses": (ranks, 1), "ring": (1, ranks)}.get(method)
    if fixed is None and ulysses is None and ring is None:
        fixed = (gcd(ranks, heads), ranks // gcd(ranks, heads))
    if fixed is not None:
        found = (fixed[0] if ulysses is None else ulysses, fixed[1] if ring is None else ring)
        if method in ("ulysses", "ring") and found != fixed:
            raise InputError(
                f"parallel.ulysses={found[0]} parallel.ring={found[1]}: method {method} on {ranks} ranks is"
                f" ulysses={fixed[0]} ring={fixed[1]}; other degrees need parallel.method=tas, usp or torus"
            )
    else:
        found = (ulysses or max(ranks // (ring or 1), 1), ring or max(ranks // (ulysses or 1), 1))
    if found[0] * found[1] != ranks:
        raise InputError(
            f"parallel.ulysses={found[0]} parallel.ring={found[1]}: their product must be the {ranks} ranks of the"
            f" group; legal pairs: {', '.join(f'{d}x{ranks // d}' for d in range(1, ranks + 1) if ranks % d == 0)}"
        )
    if found[0] > heads:
        raise InputError(f"parallel.ulysses={found[0]}: the model has {heads} heads; allowed: 1 to {heads}")
    return found


@dataclass(frozen=True, order=True)
class Layout:
    """A method, its degrees, and how it is cut.

    pieces: torus only, into how many pieces the remote rows are cut; 0: one a row. groups: into how many groups the
    heads of a rank are cut, which are exchanged and attended one after the other.
    """

    method: str
    ulysses: int
    ring: int
    pieces: int = 0
    groups: int = 1

    def schedule(self) -> Schedule:
        function, order = METHODS[self.method]
        extents = {U: self.ulysses, R: self.ring}
        mesh = Mesh(*((axis, extents[axis]) for axis in order))
        cut_up = partial(function, pieces=self.pieces) if function is torus else function
        return Schedule.of(str(self), cut_up, mesh, self.groups)

    def __str__(self) -> str:
        cuts = [f"{self.pieces} pieces"] * bool(self.pieces) + [f"{self.groups} groups"] * (self.groups > 1)
        return ", ".join([f"{self.method} {self.ulysses} x {self.ring}", *cuts])


def schedule(method: str, ulysses: int, ring: int, pieces: int = 0, groups: int = 1) -> Schedule:
    """The schedule of `method` on `ulysses * ring` ranks, see Layout."""
    return Layout(method, ulysses, ring, pieces, groups).schedule()


def inter_elements(method: str, shape: Shape, nodes: int) -> float | None:
    """Elements that cross nodes in one layer, all nodes together (StreamFusion, section 3); None where no formula is.

    Holds where the mesh fits the machine: the outer axis across `nodes` nodes, everything cut evenly.
    """
    total = shape.batch * shape.length * shape.heads * shape.dim
    formula: dict[str, Callable[[int], float]] = {
        "usp": lambda n: 2 * (n - 1) * total,
        "tas": lambda n: 4 * (n - 1) / n * total,
        "torus": lambda n: 4 * (n - 1) / n * total,
    }
    return formula[method](nodes) if method in formula else None

"""The parallel attention methods: each a function of a mesh and a rank that returns that rank's steps.

Ulysses (all-to-all of heads against tokens), Ring (keys and values go round), and their product are one function on
different meshes; which axis lies across nodes makes the difference between USP (arXiv 2405.07719) and TAS, and the
second function is Torus Attention (TAS and Torus: StreamFusion / SwiftFusion, arXiv 2601.20273).
"""

from collections.abc import Callable
from math import gcd

from ..errors import InputError
from ..mesh import Mesh
from .schedule import Attend, Method, Piece, Pull, Push, Schedule, Shape, Step

U, R = "ulysses", "ring"


def product(mesh: Mesh, rank: int) -> list[Step]:
    """Ulysses x Ring: q, k, v of the ulysses mates for this rank's heads, then each ring member's k, v in turn."""
    u, r = mesh.coords(rank)[U], mesh.coords(rank)[R]

    def mates(r: int) -> tuple[int, ...]:
        return tuple(mesh.rank(ulysses=u + i, ring=r) for i in range(mesh.extent(U)))

    steps: list[Step] = [Pull(Piece(t, mate, u), mate) for t in "vkq" for mate in mates(r)[1:]]
    for hop in range(mesh.extent(R)):
        if hop:
            neighbour = mesh.rank(ulysses=u, ring=r + 1)
            steps += [Pull(Piece(t, who, u), neighbour) for who in mates(r + hop) for t in "vk"]
        steps.append(Attend(mates(r), mates(r + hop)))
    return steps + [Push(Piece("o", mate, u), mate) for mate in mates(r)[1:]]


def torus(mesh: Mesh, rank: int) -> list[Step]:
    """Torus Attention: own row first, then q as it arrives, then k and v as they arrive, own q last.

    A row is a ring (inside a node on the TAS mesh); `row(0)` is stationary: it needs no network.
    """
    u, r, rows = mesh.coords(rank)[U], mesh.coords(rank)[R], mesh.extent(U)
    mates = tuple(mesh.rank(ulysses=u + i, ring=r) for i in range(rows))

    def row(i: int) -> tuple[int, ...]:
        return tuple(mesh.rank(ulysses=u + i, ring=r + j) for j in range(mesh.extent(R)))

    def from_ring(i: int) -> list[Step]:
        return [
            Pull(Piece(t, who, u), mesh.rank(ulysses=u, ring=r + j)) for j, who in enumerate(row(i)) if j for t in "vk"
        ]

    steps: list[Step] = [*from_ring(0), Attend(mates[:1], row(0))]
    for mate in mates[1:]:
        steps += [Pull(Piece("q", mate, u), mate), Attend((mate,), row(0))]
    for i in range(1, rows):
        steps += [Pull(Piece(t, mates[i], u), mates[i]) for t in "vk"] + from_ring(i)
        if i < rows - 1:
            steps.append(Attend(mates, row(i)))
    for mate in mates[1:]:
        steps += [Attend((mate,), row(rows - 1)), Push(Piece("o", mate, u), mate)]
    return steps + ([Attend(mates[:1], row(rows - 1))] if rows > 1 else [])


def gather(mesh: Mesh, rank: int) -> list[Step]:
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


def schedule(method: str, ulysses: int, ring: int) -> Schedule:
    """The schedule of `method` on `ulysses * ring` ranks."""
    function, order = METHODS[method]
    extents = {U: ulysses, R: ring}
    return Schedule.of(method, function, Mesh(*((axis, extents[axis]) for axis in order)))


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

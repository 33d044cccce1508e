"""What the tests of this folder run under mpirun."""

from typing import Any

from mpi4py import MPI

from hpcdit.attention.schedule import Shape
from hpcdit.cluster import Cluster, World
from hpcdit.transport.mpi import WIRES, MpiTransport
from tests.attention_cases import Case
from tests.mpi.groups import each_size


def transports(comm: MPI.Intracomm) -> Any:
    """Every method on 1 to 6 ranks as nodes of 1, 2 and 3, both ways between nodes: the largest error, and how many."""

    def body(world: World) -> tuple[float, int]:
        worst, count = 0.0, 0
        for ranks_per_node in (1, 2, 3):
            nodes = Cluster(world, ranks_per_node)
            for wire in WIRES if nodes.node_count > 1 else WIRES[:1]:
                for method, ulysses, ring in degrees(world.size):
                    case = Case(
                        method,
                        ulysses,
                        ring,
                        Shape(1, 61 - world.size, max(ulysses, 5), 6),
                        layers=5,
                        seed=count,
                    )
                    worst = max(worst, *case.run(MpiTransport(nodes, wire)))
                    count += 1
            nodes.close()
        return world.largest(worst, "the errors"), count

    return each_size(comm, body, [(6,), (5, 1), (4, 2), (3,)])


def degrees(ranks: int) -> list[tuple[str, int, int]]:
    """Every method with every pair of degrees."""
    pairs = [(d, ranks // d) for d in range(1, ranks + 1) if ranks % d == 0]
    both = [(method, *pair) for method in ("usp", "tas", "torus") for pair in pairs]
    return [("ulysses", ranks, 1), ("ring", 1, ranks), *both]

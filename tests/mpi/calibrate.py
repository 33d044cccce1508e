"""What test_calibrate.py runs under mpirun."""

from dataclasses import asdict
from typing import Any

import torch

from hpcdit.cluster import MPI, Cluster, World
from hpcdit.device import cpu
from hpcdit.planner import calibrate
from hpcdit.transport.mpi import MpiTransport


def costs(comm: MPI.Comm) -> Any:
    """By ranks a node: every rank's costs, measured and then from the cache, and the transport's count of bytes."""
    world = World(comm.Dup())
    world.timeout_s = 30
    torch.set_num_threads(world.cores)
    found = []
    for per_node in (1, 2, comm.size):
        cluster = Cluster(world, per_node)
        transport = MpiTransport(cluster)
        every = [
            comm.allgather(asdict(calibrate.calibrate(cluster, transport, cpu(), torch.float32, 24))) for _ in range(2)
        ]
        found.append([*every, asdict(transport.traffic)])
        cluster.close()
    world.close()
    return found

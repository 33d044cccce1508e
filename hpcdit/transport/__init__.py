"""One-sided communication between ranks."""

from typing import TYPE_CHECKING

from ..device import Device
from ..errors import InputError
from .base import Transport
from .local import LocalTransport

if TYPE_CHECKING:
    from ..cluster import Cluster

KINDS = ("auto", "mpi", "nvshmem")


def connect(cluster: "Cluster", device: Device, kind: str, inter: str) -> Transport:
    """The transport between the ranks of `cluster`, from memory of `device` where it can. Collective.

    kind: one of KINDS; auto: NVSHMEM between GPUs, else MPI. inter: see MpiTransport. Raises InputError on all ranks.
    """
    from .mpi import MpiTransport  # starts MPI

    if kind == "nvshmem" and not device.cuda:
        raise InputError("transport.kind=nvshmem: there is no GPU for each rank; allowed: auto or mpi")
    if cluster.world.size == 1:
        return LocalTransport(device.torch)
    return cluster.world.together(lambda: MpiTransport(cluster, inter), "the links")

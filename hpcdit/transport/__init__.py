"""One-sided communication between ranks: by NVSHMEM between GPUs, by MPI between hosts."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..device import Device
from ..errors import InputError
from .base import Transport
from .local import LocalTransport

if TYPE_CHECKING:
    from ..cluster import Cluster, World
    from .shelf import Shelf


class Network:
    """How the ranks of a run reach each other; closed when all transports are."""

    def __init__(
        self, world: "World", device: Device, kind: str, inter: str, heap_bytes: int, say: Callable[[str], None]
    ) -> None:  # fmt: skip
        """Starts NVSHMEM where it is wanted. Collective over the world.

        kind: auto, mpi or nvshmem; auto: NVSHMEM between GPUs, or MPI where that does not start, which `say` tells.
        inter: see MpiTransport; heap_bytes: of symmetric memory. Raises InputError on all ranks.
        """
        self.device, self.inter, self._nvshmem = device, inter, False
        self._shelves = list["Shelf"]()
        if kind == "nvshmem" and not device.cuda:
            raise InputError("transport.kind=nvshmem: there is no GPU for each rank; allowed: auto or mpi")
        if world.size > 1 and device.cuda and kind != "mpi":
            from .heap import start

            try:
                start(world, device.torch, heap_bytes)
                self._nvshmem = True
            except InputError as error:
                if kind == "nvshmem":
                    raise
                say(f"{error}; transfers go by MPI, through the hosts' memory")

    def transport(self, cluster: "Cluster") -> Transport:
        """Between the ranks of `cluster`, and from memory of their devices where it can. Collective over it."""
        if cluster.world.size == 1:
            return LocalTransport(self.device.torch)
        if self._nvshmem:
            from .nvshmem import NvshmemTransport

            return NvshmemTransport(cluster)
        from .mpi import MpiTransport  # starts MPI

        return cluster.world.together(lambda: MpiTransport(cluster, self.inter), "the links")

    def shelf(self, cluster: "Cluster", sizes: Sequence[int], place: str) -> "Shelf":
        """For layers of so many bytes each, which the ranks of each node hold together. Collective over the world.

        place: sharded, on the devices, or host. Raises InputError on all ranks.
        """
        from .shelf import DeviceShelf, HostShelf

        if place == "sharded" and self.device.cuda and cluster.world.size > 1:
            if self._nvshmem:
                self._shelves.append(DeviceShelf(cluster, sizes))
                return self._shelves[-1]
            raise InputError("model.layers=sharded: between GPUs that takes NVSHMEM, see run.log; allowed: host")
        self._shelves.append(HostShelf(cluster, sizes, self.device.torch))
        return self._shelves[-1]

    def peak_bytes(self) -> int:
        """Symmetric memory of this process's device that was in use at the same time, at most."""
        if not self._nvshmem:
            return 0
        from .heap import current

        return current().peak

    def close(self) -> None:
        """Collective over the world."""
        while self._shelves:
            self._shelves.pop().close()
        if self._nvshmem:
            from .heap import finish

            finish()

"""Layers of a model in the memory of a node's ranks, each some of them. Whoever needs one gets it, nobody is asked.

Groups of ranks need not be at the same layer, nor at the same video: a get is one-sided. What it is for is ZeRO's third
stage, Rajbhandari et al., arXiv 1910.02054, without its collectives; from the host's memory to a GPU it is what
DistZO2, arXiv 2507.03211, does with two layers of a model at a time.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..cluster import Cluster
from ..errors import InputError
from ..group import NAP_S
from .wires import Memory

PAGE = 4096  # bytes: what a GPU is to read by itself are whole pages
PART = 1 << 30  # bytes of a get: MPI counts in 32 bits
SHM = "/dev/shm"  # where MPI has the memory that ranks of a host share


def places(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """Where each layer lies: the rank in its node that has it, in turn, and its first byte there."""
    ends, found = [0] * ranks, list[tuple[int, int]]()
    for number, size in enumerate(sizes):
        rank = number % ranks
        found.append((rank, ends[rank]))
        ends[rank] += -(-size // PAGE) * PAGE
    return found


def room(sizes: Sequence[int], ranks: int) -> int:
    """Bytes of the rank that has most."""
    ends = [at + -(-size // PAGE) * PAGE for (_, at), size in zip(places(sizes, ranks), sizes, strict=True)]
    return max(ends, default=0)


class Shelf(ABC):
    """sizes: bytes of each layer. A layer is put there once, by its owner, before anybody gets it."""

    def __init__(self, cluster: Cluster, sizes: Sequence[int]) -> None:
        self._cluster, self._sizes = cluster, sizes
        self._places = places(sizes, cluster.node_comm.size)

    def mine(self, layer: int) -> Tensor | None:
        """The bytes of a layer that this rank owns; None of others'."""
        rank, at = self._places[layer]
        return self._own(at, self._sizes[layer]) if rank == self._cluster.local_rank else None

    @property
    @abstractmethod
    def on_device(self) -> bool:
        """Whether this rank computes with what it owns where it lies."""

    @abstractmethod
    def _own(self, at: int, size: int) -> Tensor: ...

    @abstractmethod
    def fetch(self, layer: int, into: Tensor) -> Callable[[], None]:
        """Begins to bring all bytes of a layer, when all is done that the current stream was given.

        What is returned lets the caller, or the stream that is current then, wait for it.
        """

    def filled(self) -> None:
        """After each rank has put what it owns; collective over the cluster."""
        self._cluster.world.barrier("the layers")

    @abstractmethod
    def close(self) -> None:
        """Collective over the cluster; nobody computes with a layer any more."""


class HostShelf(Shelf):
    """In the host's memory: windows that the ranks of a node share.

    For a GPU a layer is copied by its copy engine, from memory that it reads by itself. Else it is got by MPI, on a
    thread of its own.
    """

    def __init__(self, cluster: Cluster, sizes: Sequence[int], device: torch.device) -> None:
        """Collective over the cluster. Raises InputError on all its ranks where the host has no room."""
        super().__init__(cluster, sizes)
        world = cluster.world
        world.together(lambda: self._check_room(world.hosts.count(world.hosts[world.rank])), "the layers")
        with world.blocking("the layers"):
            self._memory = Memory(cluster, room(sizes, cluster.node_comm.size))
        first = cluster.nodes.index(cluster.node)
        self._first, self._cuda = first, device.type == "cuda"
        arrays = [self._memory.of(first + rank) for rank in range(cluster.node_comm.size)]
        self._bytes = [torch.from_numpy(array) for array in arrays if array is not None]
        self._pool = ThreadPoolExecutor(1, "hpcdit-layers")
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._pinned = [part for part in self._bytes if self._cuda and _pin(part)]

    def _check_room(self, ranks: int) -> None:
        """Once per host: all its nodes have whole models."""
        if not os.path.isdir(SHM):
            return
        nodes = -(-ranks // self._cluster.node_comm.size)
        found = os.statvfs(SHM)
        free, need = found.f_bavail * found.f_frsize, nodes * sum(self._sizes)
        if free < need:
            raise InputError(
                f"model.layers: {need / 1e9:.3g} GB of layers, and {SHM}, where ranks share memory, has"
                f" {free / 1e9:.3g} GB; allowed: a larger {SHM}, or model.layers=resident"
            )

    @property
    def on_device(self) -> bool:
        return not self._cuda

    def _own(self, at: int, size: int) -> Tensor:
        return self._bytes[self._cluster.local_rank][at : at + size]

    def fetch(self, layer: int, into: Tensor) -> Callable[[], None]:
        rank, at = self._places[layer]
        if self._stream is None:
            return self._pool.submit(self._get, rank, at, into).result
        source = self._bytes[rank][at : at + len(into)]
        return _beside(self._stream, lambda: into.copy_(source, non_blocking=True))

    def _get(self, rank: int, at: int, into: Tensor) -> None:
        for start in range(0, len(into), PART):
            request = self._memory.get(into[start : start + PART].numpy(), self._first + rank, at + start)
            while not request.Test():
                time.sleep(NAP_S[0])

    def filled(self) -> None:
        self._memory.sync()
        super().filled()
        self._memory.sync()

    def close(self) -> None:
        self._pool.shutdown()
        if self._stream is not None:
            self._stream.synchronize()
        for part in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(part.data_ptr())
        with self._cluster.world.blocking("the end of the layers"):
            self._bytes = []
            self._memory.close()


class DeviceShelf(Shelf):
    """In the memory of the ranks' GPUs, at the end of NVSHMEM's; got by copy engines over NVLink."""

    def __init__(self, cluster: Cluster, sizes: Sequence[int]) -> None:
        """cluster: of the whole world. Raises InputError on all its ranks where a GPU does not address another's."""
        from .heap import current

        super().__init__(cluster, sizes)
        self._heap, world = current(), cluster.world
        nbytes = room(sizes, cluster.node_comm.size)
        nbytes = int(world.largest(nbytes, "the layers"))  # nodes may be of different sizes
        at, self._first = self._heap.nbytes - nbytes // PAGE * PAGE, cluster.nodes.index(cluster.node)
        mates = range(self._first, self._first + cluster.node_comm.size)

        def check() -> None:
            if not self._heap.near(mates):
                raise InputError(
                    "model.layers=sharded: the GPUs of a node do not address each other's memory; allowed: host"
                )
            if self._heap.fit(nbytes, at) != at:
                raise InputError("model.layers=sharded: no room in symmetric memory; allowed: host")

        world.together(check, "the layers")
        self._at, self._bytes = at, self._heap.take(at, nbytes)
        self._stream = torch.cuda.Stream(self._heap.device)

    @property
    def on_device(self) -> bool:
        return True

    def _own(self, at: int, size: int) -> Tensor:
        return self._bytes[at : at + size]

    def fetch(self, layer: int, into: Tensor) -> Callable[[], None]:
        rank, at = self._places[layer]
        source = self._heap.address(self._bytes.data_ptr() + at, self._first + rank)
        stream = self._stream.cuda_stream
        return _beside(self._stream, lambda: self._heap.copy(into.data_ptr(), source, len(into), stream))

    def filled(self) -> None:
        torch.cuda.synchronize(self._heap.device)
        super().filled()

    def close(self) -> None:
        torch.cuda.synchronize(self._heap.device)
        self._cluster.world.barrier("the end of the layers")
        self._heap.give(self._at)


def _beside(stream: torch.cuda.Stream, copy: Callable[[], object]) -> Callable[[], None]:
    """Copies on `stream`, after what the current one was given; what is returned has the then current one wait."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copy()
    done = stream.record_event()
    return lambda: torch.cuda.current_stream(stream.device).wait_event(done)


def _pin(part: Tensor) -> bool:
    """Lets the GPU read host memory by itself. What cannot be pinned is copied all the same, slowly."""
    return len(part) > 0 and int(torch.cuda.cudart().cudaHostRegister(part.data_ptr(), len(part), 0)) == 0

"""NVSHMEM in this process: its start and end, and its symmetric memory, which exchanges share out among themselves."""

import importlib
import math
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch

from ..cluster import World
from ..errors import InputError
from .front_end import FrontEnd, checked

T = TypeVar("T")

ALIGN = 256  # bytes, of buffer sets: what copy engines and vector loads like best
HEAP_BYTES = 4 << 30  # at least: links are measured with blocks of this order
SLACK = 1 << 28  # bytes of symmetric memory for NVSHMEM itself: teams and their scratch memory
INIT_S = 120  # for NVSHMEM to start on all ranks
QUEUES = 8  # CUDA's default. Streams that share a hardware queue wait for each other's waits
WHAT = "NVSHMEM's start"


class Heap:
    """This process's symmetric memory, its streams, and NVSHMEM itself; one a process, see `start`."""

    def __init__(self, world: World, device: torch.device, nbytes: int, core: Any, bindings: Any) -> None:
        """Collective over all ranks. nbytes: the same on all."""
        self.world, self.device, self.nbytes, self.core, self.nvshmem = world, device, nbytes, core, bindings
        self.set, self.reached = int(bindings.Signal_op.SIGNAL_SET), int(bindings.Cmp_type.CMP_GE)
        self._whole = core.tensor((nbytes + ALIGN,), dtype=torch.uint8)
        first = -self._whole.data_ptr() % ALIGN  # the same on all ranks
        self.bytes = self._whole[first : first + nbytes]
        self._taken: list[tuple[int, int]] = []
        self.peak = 0  # bytes taken at the same time
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._runtime = importlib.import_module("cuda.bindings.runtime")
        # Of high priority: a wait that is a kernel gets its place on an SM before more blocks of attention.
        self.puts, self.arrivals, self.forwards, self.looks = (torch.cuda.Stream(device, priority=-1) for _ in range(4))
        self.beside = self.puts, self.arrivals, self.forwards
        self.front_end: FrontEnd | None = None
        # Whose memory this GPU addresses: they are of one NVLink domain.
        pes, own = range(world.size), self.bytes.data_ptr()
        self._near = [pe for pe in pes if pe == world.rank or bindings.ptr(own, pe)]

    def find_front_end(self) -> None:
        """Uses the GPUs' front ends for signals from here on, if all have what it takes. Collective over all ranks."""
        word, me = self.bytes[:8].view(torch.int64), self.world.rank
        there = self._near[(self._near.index(me) + 1) % len(self._near)]
        address = word.data_ptr() if there == me else self.nvshmem.ptr(word.data_ptr(), there)
        front_end = FrontEnd()
        if front_end.works(self.world, self.device, word, address):
            self.front_end = front_end

    def fit(self, nbytes: int, least: int) -> float:
        """The first offset from `least` on where `nbytes` are free; infinity where none is."""
        for start, end in sorted(self._taken):
            if start >= least + nbytes:
                break
            least = max(least, end)
        return least if least + nbytes <= self.nbytes else math.inf

    def take(self, start: int, nbytes: int) -> torch.Tensor:
        self._taken.append((start, start + nbytes))
        self.peak = max(self.peak, self.nbytes - self.free())
        return self.bytes[start : start + nbytes]

    def give(self, start: int) -> None:
        self._taken = [taken for taken in self._taken if taken[0] != start]

    def put(self, target: int, source: int, nbytes: int, signal: int, pe: int, stream: int) -> None:
        """Copies `nbytes` at `source` to `pe`'s memory and then sets its signal to 1, in the order of `stream`.

        target, signal: own addresses, for which the same places of `pe` stand. To a GPU of the same NVLink domain
        neither needs an SM: a signal that a kernel sets has to wait until attention leaves it one.
        """
        if pe in self._near:
            self.copy(self.nvshmem.ptr(target, pe), source, nbytes, stream)
            self.signal(signal, pe, stream)
        elif nbytes:
            self.nvshmem.putmem_signal_on_stream(target, source, nbytes, signal, 1, self.set, pe, stream)
        else:
            self.nvshmem.signal_op_on_stream(signal, 1, self.set, pe, stream)

    def signal(self, signal: int, pe: int, stream: int) -> None:
        """Sets `pe`'s signal to 1, in the order of `stream`. signal: the own address for which `pe`'s stands."""
        if pe not in self._near:
            self.nvshmem.signal_op_on_stream(signal, 1, self.set, pe, stream)
        elif self.front_end:
            self.front_end.write(self.nvshmem.ptr(signal, pe), stream)
        else:
            self.copy(self.nvshmem.ptr(signal, pe), self._one.data_ptr(), 8, stream)

    def wait(self, signal: int, pe: int, stream: int) -> None:
        """`stream` goes on when the own signal at that address, which `pe` sets, is 1."""
        if self.front_end and pe in self._near:
            self.front_end.wait(signal, stream)
        else:
            self.nvshmem.signal_wait_until_on_stream(signal, self.reached, 1, stream)

    def near(self, pes: Iterable[int]) -> bool:
        """Whether this GPU addresses the memory of all `pes`."""
        return set(pes) <= set(self._near)

    def address(self, own: int, pe: int) -> int:
        """Where a near PE has what this one has at the address `own`."""
        return own if pe == self.world.rank else int(self.nvshmem.ptr(own, pe))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Between any memories that this GPU addresses, in the order of `stream`."""
        if nbytes:
            kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
            checked(self._runtime.cudaMemcpyAsync(target, source, nbytes, kind, stream))

    def free(self) -> int:
        return self.nbytes - sum(end - start for start, end in self._taken)

    def describe(self) -> dict[str, str]:
        """For the provenance; waits: whether those on a stream are the front end's, or kernels that spin on an SM.

        Those for GPUs that are not of the same NVLink domain are NVSHMEM's own.
        """
        has = importlib.import_module("cuda.core").Device(self.device.index).properties
        theirs = has.can_use_64_bit_stream_mem_ops and has.can_flush_remote_writes  # as NVSHMEM chooses
        return {
            "version": str(self.core.get_version().libnvshmem_version),
            "heap": f"{self.nbytes >> 20} MiB",
            "signals": "stream memory operations" if self.front_end else "copies",
            "waits": "stream memory operations" if self.front_end or theirs else "kernels",
        }

    def close(self) -> None:
        self.core.free_tensor(self._whole)
        self.core.finalize()


_heap: Heap | None = None


def start(world: World, device: torch.device, heap_bytes: int = HEAP_BYTES) -> None:
    """Starts NVSHMEM between the GPUs of all ranks, PE = rank, with one block of symmetric memory; once a process.

    Collective over the whole world, whatever groups exchange later: NVSHMEM knows one set of PEs, and allocates on all
    of them. device: this rank's own; heap_bytes: the largest of all ranks counts. Bootstrapped by a unique id that goes
    round by the world's own broadcast: NVSHMEM's MPI bootstrap would have to be built for the very MPI that runs.

    Raises InputError on all ranks where NVSHMEM cannot start: what can be found out before is, since a rank that is
    missing from a collective start is waited for for ever. All ranks end if it then still hangs.
    """
    global _heap
    if _heap is not None:
        return
    core, bindings = world.together(lambda: _load(device), WHAT)
    nbytes = -(-int(world.largest(heap_bytes, WHAT)) // ALIGN) * ALIGN
    os.environ["NVSHMEM_SYMMETRIC_SIZE"] = str(nbytes + SLACK)
    name = world.agree(lambda: _tried(lambda: _bytes(core.get_unique_id()).tobytes().hex()), WHAT)
    uid = core.get_unique_id(empty=True)
    _bytes(uid)[:] = np.frombuffer(bytes.fromhex(name), np.int8)

    def init() -> Heap:
        torch.cuda.set_device(device)
        own = importlib.import_module("cuda.core").Device(device.index)
        own.set_current()
        core.init(device=own, uid=uid, rank=world.rank, nranks=world.size, initializer_method="uid")
        return Heap(world, device, nbytes, core, bindings)

    limit = threading.Timer(INIT_S, world.abort, (4, f"NVSHMEM has not started on all ranks within {INIT_S} s"))
    limit.daemon = True
    with world.blocking(WHAT):
        limit.start()
        try:
            _heap = world.together(lambda: _tried(init), WHAT)
            _heap.find_front_end()
        finally:
            limit.cancel()


def finish() -> None:
    """Ends NVSHMEM, after all exchanges are closed; collective over the whole world."""
    global _heap
    if _heap is not None:
        heap, _heap = _heap, None
        torch.cuda.synchronize(heap.device)
        with heap.world.blocking("NVSHMEM's end"):
            heap.close()


def current() -> Heap:
    assert _heap is not None, "NVSHMEM has not been started"
    return _heap


def _load(device: torch.device) -> tuple[Any, Any]:
    """nvshmem.core and nvshmem.bindings, with their library. Raises InputError."""
    if device.type != "cuda":
        raise InputError("transport.kind=nvshmem: there is no GPU for each rank; allowed: auto or mpi")
    if (queues := os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")).isdigit() and int(queues) < QUEUES:
        raise InputError(
            f"transport.kind=nvshmem: CUDA_DEVICE_MAX_CONNECTIONS={queues}, and transfers would queue behind waits;"
            f" allowed: unset, or {QUEUES} to 32"
        )
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise InputError(
            "transport.kind=nvshmem: CUDA_LAUNCH_BLOCKING is on, and nobody could send while one waits; allowed: 0"
        )

    def load() -> tuple[Any, Any]:
        core = importlib.import_module("nvshmem.core")
        core.get_version()  # loads the library
        return core, importlib.import_module("nvshmem.bindings")

    return _tried(load)


def _tried(body: Callable[[], T]) -> T:
    """What `body` returns; whatever it raises as an InputError."""
    try:
        return body()
    except Exception as error:
        said = " ".join(str(error).split()) or repr(error)
        raise InputError(f"transport.kind=nvshmem: NVSHMEM does not start: {said}; allowed: auto or mpi") from error


def _bytes(uid: Any) -> np.ndarray:
    found: np.ndarray = uid._data.view(np.int8)  # as nvshmem.core's own broadcast does
    return found

"""The device of a rank: which one it is, and the kernels that run on it."""

import importlib
import importlib.util
import json
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.cuda import Stream

from .errors import InputError
from .kernels.base import Kernels
from .spans import Record, Spans, StreamSpans

if TYPE_CHECKING:
    from .cluster import World


class StreamClock:
    """The clock of a GPU, as a `spans.Clock`; its ranges are NVTX's."""

    push = staticmethod(torch.cuda.nvtx.range_push)
    pop = staticmethod(torch.cuda.nvtx.range_pop)

    def __init__(self, device: torch.device) -> None:
        # torch hands out a few streams by turns. Of those of high priority nobody asks for new ones again and again.
        self._aside = Stream(device, priority=-1)
        try:
            torch.cuda.Event(enable_timing=True, external=True)
            self.in_graphs = True
        except TypeError:
            self.in_graphs = False

    def mark(self, captured: bool) -> torch.cuda.Event | None:
        if captured and not self.in_graphs:
            return None
        # In a graph an event is a node of it only if what reads it is outside.
        event = torch.cuda.Event(enable_timing=True, **({"external": True} if captured else {}))
        event.record()
        return event

    def aside(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._aside)
        return event


@dataclass(frozen=True)
class Device:
    """Where a rank's tensors are, and what computes with them. name: for people."""

    torch: torch.device
    kernels: Kernels
    name: str

    @property
    def cuda(self) -> bool:
        return self.torch.type == "cuda"

    @cached_property
    def clock(self) -> StreamClock | None:
        """Of its streams, if it has any."""
        return StreamClock(self.torch) if self.cuda else None

    def spans(self, record: Record | None, now: Callable[[], float], outer: Record | None) -> Spans:
        """What times the steps that this device computes; the arguments are those of `Spans`."""
        if self.clock is None or outer is None:
            return Spans(record, now, outer)
        return StreamSpans(record, now, outer, self.clock)

    def repeated(self, body: Callable[[], object], calls: int) -> Callable[[], None]:
        """What calls `body`, which has run before, so many times; on a GPU as passes do, from a graph."""
        if not self.cuda:
            return lambda: _call(body, calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            _call(body, calls)
        return graph.replay

    def synchronize(self) -> None:
        """Returns when everything is done that this process has asked of the device."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def synchronize_stream(self) -> None:
        """Returns when the current stream's work is done, whatever others have."""
        if self.cuda:
            torch.cuda.current_stream(self.torch).synchronize()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work of the body runs beside what others do on the device; it is done when the body ends."""
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    @cached_property
    def _side(self) -> Stream:
        # One for all: torch has 32 to hand out by turns, and one of them captures graphs.
        return Stream(self.torch)

    def forget_peak(self) -> None:
        """Lets `peak_bytes` begin anew, where there is a device of its own."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_bytes(self) -> int:
        """The most that this process held of the device's memory by way of torch; on the CPU, of the machine's."""
        return torch.cuda.max_memory_allocated(self.torch) if self.cuda else resident_peak_bytes()

    def memory_bytes(self) -> float | None:
        """Of the device, if it has memory of its own."""
        return float(torch.cuda.get_device_properties(self.torch).total_memory) if self.cuda else None


def _call(body: Callable[[], object], times: int) -> None:
    for _ in range(times):
        body()


def resident_peak_bytes() -> int:
    """The most that this process held of the machine's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bind(kind: str, world: "World", exact: bool = False) -> Device:
    """This rank's device; all ranks have one of the same kind. Collective.

    kind: auto, cpu or cuda; auto: a GPU where every rank has one to itself. exact: float32 is float32 in convolutions
    too, of whose mantissa torch else takes ten bits on a GPU. Raises InputError on all ranks.
    """
    if kind == "cpu":
        return cpu()
    # Streams that share one of CUDA's queues wait for each other's waits; read once, when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    count, what = torch.cuda.device_count(), "the devices"
    # With one visible device a rank has its own by its launcher: srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES.
    mine = [count, str(torch.cuda.get_device_properties(0).uuid) if count else ""]
    found = world.broadcast([json.loads(text) for text in world.gather(json.dumps(mine).encode(), 0, what)], what)
    if not all(_enough(rank, found, world.hosts) for rank in range(world.size)):
        if kind == "auto":
            return cpu()
        raise InputError(
            f"model.device=cuda: every rank needs a GPU of its own, and the ranks see {[n for n, _ in found]} of them;"
            " allowed: fewer ranks a node, or model.device=cpu"
        )
    if world.largest(importlib.util.find_spec("cupy") is None, what):
        raise InputError(
            "model.device: there are GPUs, and CuPy, which they need, is not installed; allowed:"
            " `pip install 'hpcdit[cuda13]'` (or cuda12), or model.device=cpu"
        )
    device = torch.device("cuda", world.host_comm.rank if count >= world.host_comm.size else 0)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = not exact
    return Device(device, importlib.import_module(".kernels.cuda", __package__), torch.cuda.get_device_name(device))


def cpu() -> Device:
    kernels = importlib.import_module(".kernels.cpu", __package__)
    return Device(torch.device("cpu"), kernels, "CPU")


def _enough(rank: int, found: Sequence[tuple[int, str]], hosts: Sequence[int]) -> bool:
    """Whether `rank` has a device to itself. found: of each rank how many it sees, and which is the first."""
    here = [other for other in range(len(hosts)) if hosts[other] == hosts[rank]]
    count, first = found[rank]
    return count >= len(here) or (count == 1 and [found[other][1] for other in here].count(first) == 1)

"""What the benchmarks on GPUs share: a GPU for each rank, NCCL beside MPI, kernels to compare with, events, graphs."""

import argparse
import importlib
import os
import socket
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hpcdit.cluster import MPI, World
from hpcdit.errors import InputError

T = TypeVar("T")
Attend = Callable[..., tuple[Tensor, Tensor]]  # q, k, v, [B, L, H, D] each -> out [B, L, H, D], lse [B, H, L]

WHAT = "the benchmark"
WARM = 3  # calls before a capture, and before what is timed


def run(parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace, World], None]) -> int:
    """Parses the command line and calls `body` on every rank; one rank's error ends all of them."""
    if MPI.COMM_WORLD.rank:  # one rank says what is wrong
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    args = parser.parse_args()
    sys.stderr = sys.__stderr__
    try:
        world = World()
        try:
            body(args, world)
            code = 0
        except InputError as error:  # the same on every rank
            say(world, f"bench: {error}")
            code = 2
        if dist.is_initialized():
            dist.destroy_process_group()
        world.close()
        return code
    except (Exception, KeyboardInterrupt):
        print(traceback.format_exc(), file=sys.__stderr__, flush=True)
        MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # Abort may return before the launcher has heard of it


def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def bind(world: World) -> torch.device:
    """This rank's GPU, made the current one. Raises InputError if there are more ranks than GPUs."""
    count = torch.cuda.device_count()
    if world.largest(world.host_comm.size > count, WHAT):
        raise InputError(f"{world.host_comm.size} ranks on a host of {count} GPUs: start one a GPU")
    device = torch.device("cuda", world.host_comm.rank)
    torch.cuda.set_device(device)
    return device


def cards(world: World, device: torch.device) -> str:
    """The GPUs and libraries, for a table's head."""
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"{world.size} x {torch.cuda.get_device_name(device)}, {versions}"


def nccl(world: World, device: torch.device) -> None:
    """Sets up torch.distributed for the ranks of MPI, over NCCL, or Gloo between CPUs.

    Raises InputError if they are on several hosts.
    """
    if len(set(world.hosts)) > 1:
        raise InputError("NCCL is set up by way of 127.0.0.1 here: run it on one host")
    ours = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": device.index or 0}
    port = world.broadcast(free_port() if world.rank == 0 else None, WHAT)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, **{k: str(v) for k, v in ours.items()})
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def seconds(call: Callable[[], object], count: int) -> list[float]:
    """The time of each of `count` calls one after the other, by events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [first.elapsed_time(second) / 1e3 for first, second in pairwise(events)]


class Clocks:
    """Samples this GPU's clock and power while it is entered, where NVML's Python binding is installed."""

    EVERY_S = 0.01

    def __init__(self, device: torch.device) -> None:
        self._found, self._stop, self._nvml = list[tuple[float, float]](), threading.Event(), None
        with suppress(ImportError):
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # numbers are others than CUDA's
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid.encode())

    def __enter__(self) -> "Clocks":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while self._nvml and not self._stop.wait(self.EVERY_S):
            clock = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
            self._found.append((clock, self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3))

    def __str__(self) -> str:
        """Averages: MHz, W."""
        if not self._found:
            return "-"
        mhz, watts = (statistics.mean(values) for values in zip(*self._found, strict=True))
        return f"{mhz:.0f}, {watts:.0f}"


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """`call` as a CUDA graph: each call of the result replays it, and returns the tensors that it writes to."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        out = call()

    def replay(_held: object = call) -> T:  # a graph does not keep what it reads
        graph.replay()
        return out

    return replay


def kernels_by_time(call: Callable[[], object], count: int = 25) -> str:
    """A table of what the GPU runs in one call: the kernels and copies that take the longest, each name's together."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: -e.self_device_time_total)
    times = [e.self_device_time_total / 1e3 for e in events]
    total = max(sum(times), 1e-9)
    rows = [[e.key[:90], f"{t:.2f}", f"{t / total:.1%}", f"{e.count}"] for e, t in zip(events, times, strict=True)]
    rest = sum(times[count:])
    rows[count:] = [["all others", f"{rest:.2f}", f"{rest / total:.1%}", ""]]
    return table(["kernel", "ms", "share", "calls"], rows)


def cudnn(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """cuDNN's attention, as torch has it. What else a library hands over says what is the default here anyway."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_rest = attend(*heads_first, None, True, 0.0, False, False)
    return out.transpose(1, 2), lse.reshape(lse.shape[:3])


def fa3(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """FlashAttention 3, of the package fa3-fwd."""
    import fa3_fwd_interface  # type: ignore[import-not-found, unused-ignore]

    out, lse, *_rest = fa3_fwd_interface.flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def kernels() -> dict[str, Attend]:
    """The attention kernels that there are, by name."""
    try:
        import fa3_fwd_interface  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        return {"cuDNN": cudnn}
    return {"cuDNN": cudnn, "FA3": fa3}


def difference(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|, of all elements together."""
    x, reference = x.double(), reference.double()
    return float((x - reference).norm() / reference.norm())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, the first to the left and all others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )

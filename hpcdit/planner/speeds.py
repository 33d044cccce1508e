"""How quick the device of a rank is: kernels timed while all ranks time theirs, the slowest deciding."""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..device import Device
from ..group import Group
from .costs import Speeds
from .measured import fit

WHAT = "the measurement of the machine"
SECONDS = 0.08  # that one timing may take, about
CALLS = 10  # of which one timing consists, at most
QUERIES = (16, 40, 72, 136, 264, 512)  # of the attention calls that are timed: a little more than a tile, mostly
QUERY_TILE = 128  # of the flash kernels for GPUs


def speeds(world: Group, device: Device, dtype: torch.dtype, head_dim: int) -> Speeds:
    """Collective; the same on every rank but for the last bits."""
    timed = Timer(world, device)
    size, copied = (8192, 1 << 28) if device.cuda else (384, 1 << 24)
    flops, call_s, lanes, tile = (_attention_cuda if device.cuda else _attention_cpu)(timed, dtype, head_dim)
    a = torch.randn(size, size, device=device.torch).to(dtype)
    source = torch.ones(copied, dtype=torch.uint8, device=device.torch)  # more than caches hold
    matmul_flops = 2 * size**3 / timed(lambda: a @ a)
    memory = device.memory_bytes() or _host_bytes() / world.hosts.count(world.hosts[world.rank])
    return Speeds(flops, matmul_flops, call_s, lanes, tile, timed.copy(source), -world.largest(-memory, WHAT))


class Timer:
    """Seconds of calls, on the slowest rank, while all ranks call."""

    def __init__(self, world: Group, device: Device) -> None:
        self.world, self.device = world, device

    def __call__(self, body: Callable[[], object]) -> float:
        """The quickest of a few."""
        for _ in range(2):  # the first is never like the others
            before = time.perf_counter()
            body()
            self.device.synchronize()
        calls = 1
        if self.device.cuda:  # which is given its next call while it still works
            calls = max(1, min(CALLS, int(SECONDS / 4 / (time.perf_counter() - before))))
        replay = self.device.repeated(body, calls)
        self.world.barrier(WHAT)
        best, start = math.inf, time.perf_counter()
        for _ in range(5):
            before = time.perf_counter()
            replay()
            self.device.synchronize()
            best = min(best, (time.perf_counter() - before) / calls)
            if time.perf_counter() - start > SECONDS:
                break
        return self.world.largest(best, WHAT)

    def copy(self, source: torch.Tensor) -> float:
        """Bytes a second that a rank copies out of `source` into memory of its own."""
        target = torch.empty_like(source)
        return source.nbytes / self(lambda: target.copy_(source))


def attending(device: Device, dtype: torch.dtype, dim: int) -> Callable[[], object]:
    """A call of the attention kernel, of a millisecond or so."""
    tokens, heads = (8192, 24) if device.cuda else (256, 2)
    q = torch.randn(tokens, 1, heads, dim, device=device.torch).to(dtype)
    return lambda: device.kernels.attend(q, q, q)


def _attention_cpu(timed: Timer, dtype: torch.dtype, dim: int) -> tuple[float, float, int, int]:
    """(operations a second, seconds a call, lanes, tile), fitted to calls of several sizes."""
    keys, heads, attend = 1024, 2, timed.device.kernels.attend
    k = torch.randn(keys, 1, heads, dim).to(dtype)

    def seconds(queries: int, keys: int) -> float:
        q = torch.randn(queries, 1, heads, dim).to(dtype)
        return timed(lambda: attend(q, k[:keys], k[:keys]))

    call_s = seconds(1, 1)
    times = {queries: max(seconds(queries, keys) - call_s, 1e-9) for queries in QUERIES}
    rate, tile = fit(times, 4 * keys * heads * dim)
    return rate, call_s, 1, tile


def _attention_cuda(timed: Timer, dtype: torch.dtype, dim: int, tokens: int = 4096) -> tuple[float, float, int, int]:
    """As _attention_cpu; how calls are cut into thread blocks is known."""
    lanes = torch.cuda.get_device_properties(timed.device.torch).multi_processor_count
    heads = lanes  # so that the last wave is whole, whatever the tile
    q, one = (torch.randn(n, 1, heads, dim, device=timed.device.torch).to(dtype) for n in (tokens, 1))
    call_s = timed(lambda: timed.device.kernels.attend(one, one, one))
    whole = timed(lambda: timed.device.kernels.attend(q, q, q))
    return 4 * tokens**2 * heads * dim / max(whole - call_s, whole / 2), call_s, lanes, QUERY_TILE


def _host_bytes() -> float:
    """Memory of this host, or of the part of it that this process may use."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    with suppress(OSError, ValueError):
        found.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)

"""What links and kernels cost on the machine at hand: measured in about two seconds, kept for the next run.

All ranks measure together, since ranks share cores and links when it counts, and the slowest decides. Imports torch:
nothing that plans clusters one does not have imports this.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..group import Group
from ..kernels import cpu
from ..transport.base import Place, probe
from ..transport.mpi import MpiTransport
from .costs import Costs, Link
from .measured import fit, kept_at, read, write

WHAT = "the measurement of the machine"
QUERIES = (16, 40, 72, 136, 264, 512)  # of the attention calls that are timed: a little more than a tile, mostly
SMALL, LARGE = 1 << 12, 1 << 22  # bytes of blocks that are sent
OTHERS = 7  # nodes that a node talks to by turns, at most
MOVED = 1 << 26  # bytes that are sent while a rank computes, at most
COPIED = 1 << 24  # bytes that are copied: more than caches hold
SECONDS = 0.08  # that one timing may take, about


def calibrate(transport: MpiTransport, dtype: torch.dtype, head_dim: int) -> Costs:
    """The costs of the ranks of `transport`, the same numbers on each: as measured once for such a cluster, or now.

    Collective. A cache that cannot be read or written is no error.
    """
    world = transport.cluster.world
    about = world.gather(json.dumps(_hardware(world)).encode(), 0, WHAT)
    key = {
        "version": __version__,
        "ranks": [json.loads(data) for data in about],
        "nodes": list(transport.nodes),
        "mpi": transport.cluster.describe()["mpi"],
        "inter": transport.describe()["inter"],
        "kernel": [str(dtype), head_dim, torch.__version__],
    }
    path = kept_at(key)
    found = world.broadcast(read(path) if world.rank == 0 else None, WHAT)
    if found is None:
        # Every rank has the same by now but for the last bits of sums: rank 0's are everybody's.
        found = world.broadcast(measure(transport, dtype, head_dim).to_dict(), WHAT)
        if world.rank == 0:
            write(path, found)
    return Costs.from_dict(found)


def measure(transport: MpiTransport, dtype: torch.dtype, head_dim: int) -> Costs:
    """Measures all of Costs; collective."""
    world, traffic = transport.cluster.world, transport.traffic
    before = traffic.inter, traffic.intra
    attention_flops, call_s, tile = _attention(world, dtype, head_dim)
    copy = _copy_speed(world, torch.ones(COPIED, dtype=torch.uint8))
    intra = _intra(transport, copy)
    inter, spread = links(transport) if transport.nodes[-1] > 0 else (intra, 1.0)
    traffic.inter, traffic.intra = before
    beside = overlap(transport, inter, _attending(dtype, head_dim)) if transport.nodes[-1] > 0 else 1.0
    memory = -world.largest(-_memory_bytes() / world.hosts.count(world.hosts[world.rank]), WHAT)
    matmul_flops = _matmul_flops(world, dtype)
    return Costs(inter, intra, attention_flops, matmul_flops, call_s, 1, tile, copy, memory, spread, beside)


# Kernels


def _seconds(world: Group, body: Callable[[], object]) -> float:
    """The quickest of a few calls, on the slowest rank, while all ranks call."""
    body()  # the first is never like the others
    world.barrier(WHAT)
    best, start = math.inf, time.perf_counter()
    for _ in range(5):
        before = time.perf_counter()
        body()
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - start > SECONDS:
            break
    return world.largest(best, WHAT)


def _seconds_together(world: Group, body: Callable[[], object]) -> float:
    """As _seconds, of calls that talk to each other: each rank makes as many, and they begin together."""
    best = math.inf
    for _ in range(1 + 4):
        world.barrier(WHAT)
        before = time.perf_counter()
        body()
        best = min(best, world.largest(time.perf_counter() - before, WHAT))
    return best


def _attention(world: Group, dtype: torch.dtype, dim: int) -> tuple[float, float, int]:
    """(operations a second, seconds a call, tile) of the attention kernel, fitted to calls of several sizes."""
    keys, heads = 1024, 2
    k = torch.randn(keys, 1, heads, dim).to(dtype)

    def timed(queries: int, keys: int) -> float:
        q = torch.randn(queries, 1, heads, dim).to(dtype)
        return _seconds(world, lambda: cpu.attend(q, k[:keys], k[:keys]))

    call_s = timed(1, 1)
    times = {queries: max(timed(queries, keys) - call_s, 1e-9) for queries in QUERIES}
    rate, tile = fit(times, 4 * keys * heads * dim)
    return rate, call_s, tile


def _attending(dtype: torch.dtype, dim: int, tokens: int = 256) -> Callable[[], object]:
    """A call of the attention kernel, of a millisecond or so."""
    q = torch.randn(tokens, 1, 2, dim).to(dtype)
    return lambda: cpu.attend(q, q, q)


def _matmul_flops(world: Group, dtype: torch.dtype, size: int = 384) -> float:
    a = torch.randn(size, size).to(dtype)
    return 2 * size**3 / _seconds(world, lambda: a @ a)


def _copy_speed(world: Group, source: torch.Tensor) -> float:
    """Bytes a second that a rank copies out of `source` into memory of its own."""
    target = torch.empty_like(source)
    return source.nbytes / _seconds(world, lambda: target.copy_(source))


# Links


def links(transport: MpiTransport) -> tuple[Link, float]:
    """Between nodes, all ranks of all nodes sending at once, each to a rank of the next node; and Costs.spread."""
    ranks = max(transport.nodes.count(node) for node in set(transport.nodes))

    def seconds(nbytes: int, others: int = 1) -> float:
        return transport.measure(transport.inter, nbytes, others, rounds=3)

    small, middle = seconds(SMALL), seconds(1 << 16)
    # As large a block as a slow network moves in the time there is.
    slope = max(middle - small, 1e-6) / ((1 << 16) - SMALL)
    large = int(min(max(SECONDS / slope, 1 << 17), LARGE))
    whole = seconds(large)
    # What passes at once after a pause, and then no more, is not in the difference.
    speed = large * 3 / 4 / max(whole - seconds(large // 4), 1e-9)
    others = min(transport.nodes[-1], OTHERS)
    by_turns = others * large / seconds(large, others) if others > 1 else speed
    return Link(max(small - SMALL / speed, 1e-7), ranks * speed), min(by_turns / speed, 1.0)


def overlap(transport: MpiTransport, link: Link, body: Callable[[], object]) -> float:
    """Costs.overlap: how much slower `body`, a short call, is while every rank sends to the next node and receives.

    Collective; of the rank that it slows most.
    """
    world, times = transport.cluster.world, list[float]()
    speed = link.bytes_per_s / max(transport.nodes.count(node) for node in set(transport.nodes))
    nbytes = int(min(max(2 * SECONDS * speed, 1 << 17), MOVED))
    pattern = probe(transport.nodes, nbytes, others=1)
    exchange = transport.exchange(pattern)

    def calls(seconds: float) -> float:
        """Seconds of a call, while they last."""
        start, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < seconds:
            body()
            count += 1
        return taken / max(count, 1)

    for _ in range(1 + 5):  # the first warms up
        world.barrier(WHAT)
        alone = calls(SECONDS / 2)
        world.barrier(WHAT)
        exchange.begin()
        exchange.signal(Place(world.rank, 0))
        times.append(alone / calls(min(SECONDS, nbytes / speed / 2)))
        for transfer in pattern.transfers:
            if transfer.target.rank == world.rank:
                exchange.wait(transfer.target)
        exchange.quiet()
    world.barrier(WHAT)
    exchange.close()
    return min(-world.largest(-statistics.median(times[1:]), WHAT), 1.0)


def _intra(transport: MpiTransport, copy: float) -> Link:
    """Inside a node, each rank reading the next one's memory in place; of its own where it is alone."""
    world, nodes = transport.cluster.world, transport.nodes
    mates = [rank for rank in range(world.size) if nodes[rank] == nodes[world.rank]]
    if world.largest(len(mates), WHAT) == 1:
        return Link(1e-7, copy)
    exchange = transport.exchange(probe(transport.nodes, COPIED, others=0))
    mine = exchange.memory(world.rank, 0)
    assert mine is not None
    mine.fill_(1)  # memory that nobody has written is not like other memory
    peer = mates[(mates.index(world.rank) + 1) % len(mates)]

    def signal() -> None:
        exchange.begin()
        exchange.signal(Place(world.rank, 0))
        exchange.wait(Place(peer, 0))
        exchange.quiet()

    latency = _seconds_together(world, signal)
    theirs = exchange.memory(peer, 0)
    assert theirs is not None
    speed = _copy_speed(world, theirs)
    world.barrier(WHAT)  # nobody reads any more
    exchange.close()
    return Link(latency, speed)


# The machine, and what is known of it


def _hardware(world: Group) -> dict[str, Any]:
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return {"host": platform.node(), "cpu": model or platform.machine(), "cores": cores, "threads": world.cores}


def _memory_bytes() -> float:
    """Of this host, or of the part of it that this process may use."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    with suppress(OSError, ValueError):
        found.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)

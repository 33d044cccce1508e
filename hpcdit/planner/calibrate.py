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
from ..cluster import Cluster
from ..device import Device
from ..group import Group
from ..transport.base import Place, Transport, probe
from .costs import Costs, Link
from .measured import kept_at, read, write
from .speeds import SECONDS, WHAT, Timer, attending, speeds

SMALL, LARGE = 1 << 12, 1 << 22  # bytes of blocks that are sent
TURNS = 6  # in the first they keep in step
OTHERS = 7  # nodes that a node talks to by turns, at most
MOVED = 1 << 26  # bytes that are sent while a rank computes, at most
QUICKER = 4  # bits by which more is sent between GPUs
COPIED = 1 << 24  # bytes that are copied: more than caches hold


def calibrate(cluster: Cluster, transport: Transport, device: Device, dtype: torch.dtype, head_dim: int) -> Costs:
    """The costs of the ranks of `cluster`, the same numbers on each: as measured once for such a cluster, or now.

    Collective. A cache that cannot be read or written is no error.
    """
    world, about = cluster.world, transport.describe()
    hardware = world.gather(json.dumps(_hardware(world, device)).encode(), 0, WHAT)
    key = {
        "version": __version__,
        "ranks": [json.loads(data) for data in hardware],
        "nodes": list(cluster.nodes),
        "mpi": cluster.describe()["mpi"],
        "transport": [about["kind"], about.get("inter")],
        "kernel": [str(dtype), head_dim, torch.__version__],
    }
    path = kept_at(key)
    found = world.broadcast(read(path) if world.rank == 0 else None, WHAT)
    if found is None:
        # Every rank has the same by now but for the last bits of sums: rank 0's are everybody's.
        found = world.broadcast(measure(cluster, transport, device, dtype, head_dim).to_dict(), WHAT)
        if world.rank == 0:
            write(path, found)
    return Costs.from_dict(found)


def measure(cluster: Cluster, transport: Transport, device: Device, dtype: torch.dtype, head_dim: int) -> Costs:
    """Measures all of Costs; collective."""
    world, traffic = cluster.world, transport.traffic
    before = traffic.inter, traffic.intra
    mine = speeds(world, device, dtype, head_dim)
    intra = _intra(world, transport, device, mine.copy_bytes_per_s)
    inter, spread, beside = intra, 1.0, 1.0
    if transport.nodes[-1] > 0:
        inter, spread = links(transport)
        beside = overlap(world, transport, device, inter, attending(device, dtype, head_dim))
    traffic.inter, traffic.intra = before
    return Costs(**vars(mine), inter=inter, intra=intra, spread=spread, overlap=beside, puts=transport.streams)


# Links


def links(transport: Transport) -> tuple[Link, float]:
    """Between nodes, all ranks of all nodes sending at once, each to a rank of the next node; and Costs.spread."""
    ranks = max(transport.nodes.count(node) for node in set(transport.nodes))

    def seconds(nbytes: int, others: int = 1, turns: int = 1) -> float:
        return transport.measure(nbytes, others, 3, turns)

    small, middle = seconds(SMALL), seconds(1 << 16)
    # As large a block as a slow network moves in the time there is.
    slope = max(middle - small, 1e-6) / ((1 << 16) - SMALL)
    large = int(min(max(SECONDS / slope, 1 << 17), _most(LARGE, transport)))
    whole = seconds(large)
    # What passes at once after a pause, and then no more, is not in the difference.
    speed = large * 3 / 4 / max(whole - seconds(large // 4), 1e-9)
    others, by_turns = min(transport.nodes[-1], OTHERS), speed
    if others > 1:
        # What is lost varies: the median, not the quickest.
        times = [transport.measure(large // 4, others, 1, TURNS) for _ in range(4)]
        by_turns = others * TURNS * (large // 4) / statistics.median(times[1:])
    return Link(max(small - SMALL / speed, 1e-7), ranks * speed), min(by_turns / speed, 1.0)


def overlap(
    world: Group, transport: Transport, device: Device, link: Link, body: Callable[[], object]
) -> float:  # fmt: skip
    """Costs.overlap: how much slower `body`, a short call, is while every rank sends to the next node and receives.

    Collective; of the rank that it slows most.
    """
    times = list[float]()
    speed = link.bytes_per_s / max(transport.nodes.count(node) for node in set(transport.nodes))
    nbytes = int(min(max(2 * SECONDS * speed, 1 << 17), _most(MOVED, transport)))
    pattern = probe(transport.nodes, nbytes, others=1)
    exchange = transport.exchange(pattern)

    def calls(seconds: float) -> float:
        """Seconds of a call, while they last."""
        start, count = time.perf_counter(), 0
        while (taken := time.perf_counter() - start) < seconds or not count:
            body()
            device.synchronize_stream()
            count += 1
        return taken / count

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


def _intra(world: Group, transport: Transport, device: Device, copy: float) -> Link:
    """Inside a node, each rank reading the next one's memory; of its own where it is alone."""
    nodes = transport.nodes
    mates = [rank for rank in range(world.size) if nodes[rank] == nodes[world.rank]]
    if world.largest(len(mates), WHAT) == 1:
        return Link(1e-7, copy)
    if transport.spaces != nodes:  # nobody reads another's memory in place: blocks are sent there too
        size = _most(LARGE, transport)
        small, large = (transport.measure(nbytes, others=0) for nbytes in (SMALL, size))
        return Link(max(small, 1e-7), size / max(large - small, 1e-9))
    exchange = transport.exchange(probe(nodes, COPIED, others=0))
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
    speed = Timer(world, device).copy(theirs)
    world.barrier(WHAT)  # nobody reads any more
    exchange.close()
    return Link(latency, speed)


def _most(nbytes: int, transport: Transport) -> int:
    """Of blocks that are sent: between GPUs links are quicker, and what is measured has to last all the same."""
    return min(nbytes << QUICKER, 1 << 28) if transport.streams else nbytes


def _seconds_together(world: Group, body: Callable[[], object]) -> float:
    """The quickest of calls that talk to each other: each rank makes as many, and they begin together."""
    best = math.inf
    for _ in range(1 + 4):
        world.barrier(WHAT)
        before = time.perf_counter()
        body()
        best = min(best, world.largest(time.perf_counter() - before, WHAT))
    return best


# The machine, and what is known of it


def _hardware(world: Group, device: Device) -> dict[str, Any]:
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return {
        "host": platform.node(),
        "cpu": model or platform.machine(),
        "cores": cores,
        "threads": world.cores,
        "device": device.name,
    }

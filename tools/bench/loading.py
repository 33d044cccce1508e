"""How much of a host's memory the ranks take together while they load a model, at most and in the end.

    mpirun -n 4 python -m tools.bench.loading FOLDER bfloat16 resident

Memory that n ranks map counts as 1/n for each (Pss); what a rank keeps in memory files counts whether mapped or not.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcdit.cluster import Cluster, World, finalize
from hpcdit.config import demo_model, load
from hpcdit.device import cpu
from hpcdit.models.loading import ModelFolder, inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.render.memory import release
from hpcdit.render.weights import load_model, shelve
from hpcdit.stop import StopRequest
from hpcdit.transport import Network

EVERY_S = 0.02
WHAT = "the measurement"


def held() -> tuple[int, int, int]:
    """Bytes of this process: mapped memory but for shared memory, mapped shared memory, its own files in memory."""
    pss = {"Pss": 0, "Pss_Shmem": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        if name in pss:
            pss[name] = int(rest.split()[0]) * 1024
    files = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith("/memfd:hpcdit"):
                files += os.stat(link).st_blocks * 512
        except OSError:  # closed meanwhile
            continue
    return pss["Pss"] - pss["Pss_Shmem"], pss["Pss_Shmem"], files


def together(every: Iterable[Sequence[int]]) -> int:
    """Of all processes: a file in memory that some have mapped is there once."""
    apart, mapped, files = map(sum, zip(*every, strict=True))
    return apart + max(mapped, files)


class Sampler(threading.Thread):
    """Notes what this process holds, by the clock of the host."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen = list[tuple[float, int, int, int]]()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(EVERY_S):
            self.seen.append((time.monotonic(), *held()))


def peak(every: Sequence[Sequence[Sequence[Any]]]) -> int:
    """The most that all held together; each holds until its next sample what it held at the last."""
    moments = sorted((at, rank, held) for rank, seen in enumerate(every) for at, *held in seen)
    last, most = {rank: seen[0][1:] for rank, seen in enumerate(every)}, 0
    for _, rank, now in moments:
        last[rank] = now
        most = max(most, together(last.values()))
    return most


@dataclass(frozen=True)
class Held:
    """Bytes: of the weights, once; of all ranks together at most, and in the end; beside what they had before."""

    weights: int
    most: int
    left: int
    seconds: float


def measure(world: World, folder: ModelFolder, dtype: str, layers: str) -> Held | None:
    """Loads a model, and reads all of it; on rank 0 what that took. Collective."""
    config = load([f"model.dtype={dtype}", f"model.layers={layers}"])
    assert config is not None
    cluster, network = Cluster(world), Network(world, cpu(), "mpi", "auto", 0, print)
    PipelineAdapter.load(inspect(demo_model()))  # what any model makes a process hold
    release()
    world.barrier(WHAT)
    before = held()
    sampler = Sampler()
    world.barrier(WHAT)
    sampler.start()
    apart = layers != "resident"
    start = time.monotonic()
    adapter: Any = load_model(
        world, folder, config.model, StopRequest(), lambda found: PipelineAdapter.load(found, dtype, apart=apart)
    )
    if apart:
        shelve(cluster, adapter, network, layers, StopRequest())
    tensors = {t.data_ptr(): t for part in folder.weights for t in getattr(adapter._pipe, part).state_dict().values()}
    for tensor in tensors.values():
        tensor.sum()  # reads it: what was only mapped so far is there then
    seconds = time.monotonic() - start
    world.barrier(WHAT)
    time.sleep(3 * EVERY_S)
    sampler.ended.set()
    sampler.join()
    found = world.gather(json.dumps([before, held(), sampler.seen]).encode(), 0, WHAT)
    del adapter, tensors, tensor
    network.close()
    cluster.close()
    if not found:
        return None
    sizes = {name: getattr(torch, dtype).itemsize if name != "vae" else 4 for name in folder.weights}
    copy = sum(folder.weights[name] * size for name, size in sizes.items())
    starts, ends, seen = zip(*map(json.loads, found), strict=True)
    return Held(copy, peak(seen) - together(starts), together(ends) - together(starts), seconds)


def main(path: str, dtype: str, layers: str) -> None:
    world = World()
    if it := measure(world, inspect(Path(path)), dtype, layers):
        print(
            f"{world.size} ranks, {dtype}, {layers}: weights {it.weights / 1e6:.0f} MB; at most {it.most / 1e6:.0f} MB"
            f" ({it.most / it.weights:.2f}), in the end {it.left / 1e6:.0f} MB ({it.left / it.weights:.2f});"
            f" {it.seconds:.1f} s"
        )
    world.close()
    finalize(30)


if __name__ == "__main__":
    main(*sys.argv[1:])

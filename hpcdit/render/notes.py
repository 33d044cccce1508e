"""What run.log says of a run besides its videos: processes, the plan and its reasons, memory and bytes, the end."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from ..cluster import Cluster, World
from ..device import Device, resident_peak_bytes
from ..models.base import Adapter
from ..output.claims import failures
from ..output.trace import Trace
from ..planner.presets import to_keys
from ..planner.reasons import seconds
from ..terminal import say
from ..transport import Network
from ..transport.base import Traffic
from .batch import Batch
from .plan import ENCODERS_APART
from .planner import Planner
from .progress import Report, clock

LARGE = 10**9  # weights, of models that nobody trains in float32


def log_processes(world: World, cluster: Cluster, report: Report | None) -> None:
    """Names every rank's process in the log, for the person who looks for it on its host."""
    mine = f"rank {world.rank}: node {cluster.node}, host {world.hostname}, pid {os.getpid()}"
    for line in world.gather(mine.encode(), 0, "the processes"):
        if report:
            report.log.info(line.decode())


def log_plan(planner: Planner, report: Report) -> None:
    """What the plan follows from, what it is, and why it is no other."""
    plan, costs = planner.batch, to_keys(planner.costs)
    report.log.info("costs: %s", ", ".join(f"{key} {value:.3g}" for key, value in costs.items()))
    report.log.info("plan: %s, about %s without reading and writing", plan, seconds(plan.makespan_s))
    if planner.work.encoders_apart:
        report.log.info("%s", ENCODERS_APART)
    for other in plan.others:
        report.log.info("not %s: %s", other, other.why)


def warn_untimed(trace: Trace, device: Device, graph: bool, report: Report) -> None:
    if graph and trace.level > 1 and device.clock and not device.clock.in_graphs:
        report.log.warning(
            "trace.level=2: this torch has no events in CUDA graphs, only passes are timed;"
            " allowed: a later torch, or model.graph=false"
        )


def warn_float32(device: Device, dtype: str, weights: int, report: Report) -> None:
    """The default is what a CPU computes in, and what small models need; large ones were trained in 16 bits."""
    if device.cuda and dtype == "float32" and weights > LARGE:
        said = (
            "model.dtype=float32: a GPU makes products of 16-bit numbers many times as fast, in half the memory;"
            " model.dtype=bfloat16 is what models of this size are made for"
        )
        report.log.warning(said)
        say(f"hpcdit: {said}")


def warn_unguided(batch: Batch, cfg: int, adapter: Adapter, report: Report) -> None:
    """Such a video is not refused: in a file there may be both kinds."""
    unguided = sum(not adapter.guided(job.sampling.guidance_scale) for job in batch.todo)
    if cfg > 1 and unguided:
        report.log.warning(
            "cfg %d: %d of %d videos have no guidance, both halves compute the same for them",
            cfg, unguided, len(batch.todo),
        )  # fmt: skip


def warn_of_failures(batch: Batch, folder: Path, stale_s: float, report: Report | None) -> None:
    """Names the videos that are not tried again, since other runs that share the folder have failed at them."""
    found = failures(folder)
    ids = [job.id for job in batch.todo if job.id in found]
    if report and ids:
        few = ", ".join(ids[:3]) + ", ..." * (len(ids) > 3)
        text = (
            f"{len(ids)} of the videos failed in runs that are still at work in {folder}, and are not tried again:"
            f" {few}; a run that starts when none is tries them, or {stale_s:g} s (queue.stale_s) after one was killed"
        )
        report.log.warning("%s", text)
        say(f"hpcdit: {text}")


def log_traffic(world: World, mine: Traffic, report: Report | None) -> None:
    """What the attention of all ranks moved since they were connected, by link class. Collective."""
    every = [json.loads(text) for text in world.gather(json.dumps(vars(mine)).encode(), 0, "the bytes that were moved")]
    if report:
        inter, intra = (sum(each[link] for each in every) / 1e9 for link in ("inter", "intra"))
        report.log.info("moved by attention: %.3g GB between nodes, %.3g GB inside them", inter, intra)


def log_memory(
    world: World, device: Device, network: Network, denoising: int, planned: int, report: Report | None
) -> None:
    """The most that a rank held, beside what was planned.

    denoising: of the device's, while no video was decoded; planned: what the process held before included.
    """
    symmetric = network.peak_bytes()
    ours = (resident_peak_bytes(), device.peak_bytes() + symmetric, denoising + symmetric, planned)
    resident, peak, denoised, planned_gib = (world.largest(n, "the end of the batch") / 2**30 for n in ours)
    if report:
        plan = f", {planned_gib:.2f} GiB planned"
        report.log.info("peak memory: %.2f GiB on the largest rank%s", resident, "" if device.cuda else plan)
        if device.cuda:
            whole = f"; {peak:.2f} GiB in all"
            report.log.info(
                "peak GPU memory: %.2f GiB on the largest rank while it denoised%s%s", denoised, plan, whole
            )


def summary(folder: Path, report: Report, there: int, most_failures: int | None) -> None:
    """What this run has made, what others have, and what is left in all."""
    tally, theirs = report.tally, Counter(report.tally.theirs.values())
    text = f"{tally.done} video{'s' * (tally.done != 1)} done in {clock(report.seconds)}"
    text += f", {there} were there" * bool(there)
    text += f", {theirs['done']} done by other runs" * bool(theirs["done"])
    text += f", {tally.failed} failed (see job.h5 and run.log)" * bool(tally.failed)
    text += f", {theirs['failed']} failed in other runs (see job.h5)" * bool(theirs["failed"])
    if tally.to_go:
        enough = most_failures is not None and tally.failed >= most_failures
        text += f", {tally.to_go} {'not begun (failures.max)' if enough else 'left to runs that are at work'}"
    report.log.info(text)
    say(f"hpcdit: {text}: {folder / 'videos'}", sys.stdout)

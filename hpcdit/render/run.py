"""One render of a checked batch: brings model, transport, engine and output together."""

import gc
import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

from ..cluster import Cluster, World
from ..config import Config
from ..device import Device, bind, resident_peak_bytes
from ..errors import BrokenRun, InputError, Stopped
from ..models.base import Adapter
from ..models.families import families
from ..models.pipeline import PipelineAdapter
from ..output.catalog import rebuild
from ..output.claims import Claims, run_name
from ..output.media import Encoder
from ..output.record import Row
from ..output.store import software
from ..output.trace import EVENT, Trace
from ..planner.presets import to_keys
from ..planner.reasons import seconds
from ..stop import StopRequest
from ..terminal import say
from ..transport import Network
from ..transport.heap import HEAP_BYTES
from . import films
from .batch import Batch, as_it_is_now, output_folder
from .checkpoints import Checkpoints
from .decoding import RowDecoder, row_decoder
from .engine import Engine
from .groups import Groups, Halves
from .plan import shelves, workload
from .planner import Planner
from .progress import Report, clock, open_log
from .provenance import Provenance, priced
from .queue import Queue, batches
from .sources import Listed, Shared, Source, told
from .stages import Finisher
from .weights import load_model, on_heap, shelve

OK, FAILED = 0, 3


def render(config: Config, world: World, cluster: Cluster, batch: Batch, stop: StopRequest) -> int:
    """Renders what is to do, on all ranks together. Returns the exit code; raises Stopped when asked to stop.

    cluster: the nodes of the world.
    """
    folder = Path(config.output.dir)
    torch.set_num_threads(world.cores)
    with ExitStack() as stack:
        shared = config.queue.claims
        world.agree(lambda: stack.enter_context(output_folder(folder, shared)) and None, "the output folder")
        batch = as_it_is_now(config, world, cluster.nodes, batch)
        report = _report(config, cluster, batch) if world.rank == 0 else None
        _log_processes(world, cluster, report)
        try:
            if batch.todo:
                _render(config, world, cluster, batch, stop, report, stack)
            if config.output.video == "mp4":
                _add_films(folder / "videos", world, batch, stop, report)
        except Stopped as error:
            if report:
                report.log.warning("%s", error)
                report.close()
            raise
        except BaseException:  # what went wrong first is what is told
            if report:
                with suppress(BrokenRun):
                    report.close()
            raise
        if report:
            report.close()
        code = OK
        if report:
            code = FAILED if report.failed else OK
            _summary(folder, report, len(batch.done), config.queue.claims)
        return int(world.broadcast(code, "the exit code"))


def _render(
    config: Config, world: World, cluster: Cluster, batch: Batch, stop: StopRequest, report: Report | None,
    stack: ExitStack,
) -> None:  # fmt: skip
    # The traces' clock is rank 0's, from here on.
    zero = world.broadcast(Trace.now(), "the clocks")
    trace = Trace(world.rank, config.trace.level, world.clock_offset() - zero)
    device = bind(config.model.device, world, exact=config.model.dtype == "float32")
    trace.ranges = device.clock
    m, sampling = config.model, [job.sampling for job in batch.todo]
    held = shelves(m.layers, cluster.nodes, device.cuda)
    work = workload(batch.shape, sampling, m.dtype, config.parallel.batch, held)
    with trace.span("plan", "inter"):
        t, say = config.transport, report.log.warning if report else lambda text: None
        heap = max(work.symmetric_bytes(), HEAP_BYTES) + on_heap(batch.folder, m, held)
        network = Network(world, device, t.kind, t.inter, heap, say)
        planner = Planner.measured(config, cluster, network.transport(cluster), device, work, batch.shape.head_dim)
    plan = planner.batch
    groups = Groups.cut(world, cluster, plan.replicas, plan.cfg)
    with trace.span("connect", "inter"):
        transport = network.transport(groups.sequence)
        halves = groups.halves(network, trace)
    device.forget_peak()  # which was that of what measures
    before = 0 if device.cuda else device.peak_bytes()
    with trace.span("load", "io"):
        load, apart = PipelineAdapter.load, m.layers != "resident"
        graph = m.graph and transport.streams and not families()[batch.folder.family].masked and not apart
        options = m.dtype, device.torch, m.compile, graph, apart
        try:
            adapter = load_model(world, batch.folder, m, stop, lambda folder: load(folder, *options))
            if apart:
                shelve(cluster, adapter, network, m.layers, stop)
        except (InputError, Stopped):  # by all ranks together
            _close(None, halves, groups, network)
            raise
    gc.freeze()  # what is there by now stays to the end
    gc.enable()
    if report:
        report.log.info("device: %s; transport: %s", device.name, transport.describe())
        _warn_untimed(trace, device, graph, report)
        _log_plan(planner, report)
        _warn_unguided(batch, plan.cfg, adapter, report)
    todo = _source(config, batch, stack) if report else Listed(())  # before the finisher: what it writes stays claimed
    beside = Trace(world.rank, config.trace.level, trace.offset, trace.ranges)  # for what works beside `trace`
    decoder = row_decoder(config.parallel.vae, groups, len(batch.todo), adapter, device, beside)
    provenance = Provenance.of(config, cluster, batch, groups, priced(planner.costs, work, cluster.nodes))
    film = None
    if config.output.video == "mp4":
        film = films.encoder(device, batch.todo[0].sampling, report.log.info if report else lambda text: None)
    finisher = _finisher(config, world, device, adapter, provenance, beside, stack, decoder, film)
    checkpoints = _checkpoints(config, batch, groups, stack)
    dtype = getattr(torch, config.model.dtype)
    # What belongs to no video is the job's trace.
    events = world.gather(trace.take().tobytes(), 0, "the events of the job")
    if report:
        report.events = np.frombuffer(b"".join(events), EVENT)
    queue = Queue(
        world, plan.replicas, todo, stop, report.hear if report else None, config.failures.max, config.grace_s
    )
    engine = Engine(
        groups.number, groups.replica, transport, halves, adapter, device, dtype, graph,
        lambda shape, below: planner(shape, transport.nodes, below), finisher, trace, queue, checkpoints,
    )  # fmt: skip
    stopped: Stopped | None = None
    try:
        engine.render(batch.todo)
    except Stopped as error:  # by all ranks together
        stopped = error
    _log_memory(world, device, network, engine.denoising_bytes, planner.memory_bytes + before, report)
    _close(decoder, halves, groups, network)
    if stopped is not None:
        raise stopped


def _add_films(videos: Path, world: World, batch: Batch, stop: StopRequest, report: Report | None) -> None:
    """The MP4 files of videos that were finished without: each rank makes some. Collective."""
    mine = [job.id for job in batch.done][world.rank :: world.size]
    what = "the MP4 files of earlier videos"
    made = world.together(lambda: stop.leave(lambda: films.make(videos, films.missing(videos, mine))), what)
    every = world.gather(str(made).encode(), 0, what)
    if report and (count := sum(map(int, every))):
        report.log.info("MP4 files made of %d videos that were there", count)


def _close(decoder: RowDecoder | None, halves: Halves | None, groups: Groups, network: Network) -> None:
    """Collective: what is left open would make MPI's end abort."""
    if decoder:
        decoder.close()
    if halves:
        halves.close()
    groups.close()
    network.close()


def _warn_untimed(trace: Trace, device: Device, graph: bool, report: Report) -> None:
    if graph and trace.level > 1 and device.clock and not device.clock.in_graphs:
        report.log.warning(
            "trace.level=2: this torch has no events in CUDA graphs, only passes are timed;"
            " allowed: a later torch, or model.graph=false"
        )


def _finisher(
    config: Config, world: World, device: Device, adapter: Adapter, provenance: Provenance, trace: Trace,
    stack: ExitStack, rows: RowDecoder | None, film: Encoder | None,
) -> Finisher:  # fmt: skip
    finisher = Finisher(
        adapter,
        device,
        Path(config.output.dir) / "videos",
        provenance,
        trace,
        config.output.compression,
        film,
        world.cores,
        config.queue.claims,
        config.grace_s / 2,
        rows,
    )
    stack.callback(finisher.close)
    return finisher


def _checkpoints(config: Config, batch: Batch, groups: Groups, stack: ExitStack) -> Checkpoints | None:
    """On the first rank of each group."""
    if groups.replica.rank != 0:
        return None
    model = {"fingerprint": batch.folder.fingerprint, "dtype": config.model.dtype}
    checkpoints = Checkpoints(Path(config.output.dir), config.checkpoint.seconds, model)
    stack.callback(checkpoints.close)
    if groups.number == 0:
        checkpoints.clean(job.id for job in batch.done)
    return checkpoints


def _source(config: Config, batch: Batch, stack: ExitStack) -> Source:
    """What this run is to render, in its order."""
    todo = batches(batch.todo, config.parallel.batch or 1)
    if not config.queue.claims:
        return Listed(todo)
    with told():
        claims = Claims(Path(config.output.dir), run_name(), config.queue.stale_s)
    shared = Shared(todo, [job.id for job in batch.todo], claims)
    stack.callback(shared.close)
    return shared


def _log_memory(
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


def _log_plan(planner: Planner, report: Report) -> None:
    """What the plan follows from, what it is, and why it is no other."""
    plan, costs = planner.batch, to_keys(planner.costs)
    report.log.info("costs: %s", ", ".join(f"{key} {value:.3g}" for key, value in costs.items()))
    report.log.info("plan: %s, about %s without reading and writing", plan, seconds(plan.makespan_s))
    for other in plan.others:
        report.log.info("not %s: %s", other, other.why)


def _warn_unguided(batch: Batch, cfg: int, adapter: Adapter, report: Report) -> None:
    """Such a video is not refused: in a file there may be both kinds."""
    unguided = sum(not adapter.guided(job.sampling.guidance_scale) for job in batch.todo)
    if cfg > 1 and unguided:
        report.log.warning(
            "cfg %d: %d of %d videos have no guidance, both halves compute the same for them",
            cfg, unguided, len(batch.todo),
        )  # fmt: skip


def _report(config: Config, cluster: Cluster, batch: Batch) -> Report:
    folder, done = Path(config.output.dir), {job.id for job in batch.done}
    log = open_log(folder / (f"run-{run_name()}.log" if config.queue.claims else "run.log"))
    described = cluster.describe()
    log.info("hpcdit %s: %s", software()["hpcdit"], " ".join(sys.argv[1:]) or "(defaults)")
    log.info("cluster: %s", described)
    log.info("model: %s, %s", batch.folder.path, config.model.dtype)
    log.info("videos: %d to do, %d there", len(batch.todo), len(done))
    rows = [Row(j.index, j.id, j.prompt, j.sampling.seed, "done" if j.id in done else "pending") for j in batch.jobs]
    work = {job.id: job.sampling.steps for job in batch.todo}
    return Report(rebuild(folder, rows, config.queue.claims), log, work, len(done))


def _log_processes(world: World, cluster: Cluster, report: Report | None) -> None:
    """Names every rank's process in the log, for the person who looks for it on its host."""
    mine = f"rank {world.rank}: node {cluster.node}, host {world.hostname}, pid {os.getpid()}"
    for line in world.gather(mine.encode(), 0, "the processes"):
        if report:
            report.log.info(line.decode())


def _summary(folder: Path, report: Report, there: int, shared: bool) -> None:
    text = f"{report.done} videos done in {clock(report.seconds)}"
    text += f", {there} were there" * bool(there)
    text += f", {report.failed} failed (see job.h5 and run.log)" * bool(report.failed)
    if report.pending:
        text += f", {report.pending} {'by other runs' if shared else 'not begun (failures.max)'}"
    report.log.info(text)
    say(f"hpcdit: {text}: {folder / 'videos'}", sys.stdout)

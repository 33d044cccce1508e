"""One render of a checked batch: brings model, transport, engine and output together."""

import gc
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

from ..cluster import Cluster, World
from ..config import Config
from ..device import Device, bind
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
from ..stop import StopRequest
from ..transport import Network
from ..transport.heap import HEAP_BYTES
from . import films, notes
from .batch import Batch, as_it_is_now, output_folder
from .checkpoints import Checkpoints
from .decoding import RowDecoder, row_decoder
from .engine import Engine
from .groups import Groups, Halves
from .memory import keep_freed
from .plan import shelves, workload
from .planner import Planner
from .progress import Report, open_log
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
    keep_freed()
    with ExitStack() as stack:
        shared = config.queue.claims
        world.agree(lambda: stack.enter_context(output_folder(folder, shared)) and None, "the output folder")
        batch = as_it_is_now(config, world, cluster.nodes, batch)
        report = _report(config, cluster, batch) if world.rank == 0 else None
        notes.log_processes(world, cluster, report)
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
            notes.summary(folder, report, len(batch.done), config.queue.claims)
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
        notes.warn_untimed(trace, device, graph, report)
        notes.log_plan(planner, report)
        notes.warn_unguided(batch, plan.cfg, adapter, report)
    todo = _source(config, batch, stack) if report else Listed(())  # before the finisher: what it writes stays claimed
    beside = Trace(world.rank, config.trace.level, trace.offset, trace.ranges)  # for what works beside `trace`
    decoder = row_decoder(config.parallel.vae, groups, len(batch.todo), adapter, device, beside)
    provenance = Provenance.of(config, cluster, batch, groups, priced(planner.costs, work, cluster.nodes))
    film = None
    if config.output.video == "mp4":
        film = films.encoder(device, batch.todo[0].sampling, report.log.info if report else lambda text: None)
    finisher = _finisher(config, world, groups, device, adapter, provenance, beside, stack, decoder, film)
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
    notes.log_traffic(world, transport.traffic, report)
    notes.log_memory(world, device, network, engine.denoising_bytes, planner.memory_bytes + before, report)
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


def _finisher(
    config: Config, world: World, groups: Groups, device: Device, adapter: Adapter, provenance: Provenance,
    trace: Trace, stack: ExitStack, rows: RowDecoder | None, film: Encoder | None,
) -> Finisher:  # fmt: skip
    # Beside a rank that has no peers to wait for, on cores that are all taken, decoding only spoils the caches.
    in_turn = not device.cuda and groups.replica.size == 1 and not world.spare
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
        in_turn,
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

"""What a run is put together from, on each rank: the machine, its links, the model, and the engine over all of them."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cluster import Cluster, World
from ..config import Config
from ..device import Device, bind
from ..errors import InputError, Stopped
from ..models.base import Adapter
from ..models.families import families
from ..models.loading import ModelFolder
from ..models.pipeline import PipelineAdapter
from ..output.claims import Claims, run_name
from ..output.trace import EVENT, Trace
from ..planner.workload import Workload
from ..stop import StopRequest
from ..transport import Network
from ..transport.base import Transport
from ..transport.heap import HEAP_BYTES
from . import films, notes
from .batch import Batch
from .checkpoints import Checkpoints
from .decoding import RowDecoder, row_decoder
from .engine import Engine
from .groups import Groups, Halves
from .plan import shelves, workload
from .planner import Planner
from .progress import Report
from .provenance import Provenance, priced
from .queue import Queue, batches
from .sources import Listed, Shared, Source, told
from .stages import Finisher
from .weights import load_model, on_heap, shelve


@dataclass(frozen=True)
class Run:
    """A checked run. cluster: the nodes of the world; report: on rank 0; stack: what is closed when the run ends."""

    config: Config
    world: World
    cluster: Cluster
    batch: Batch
    stop: StopRequest
    report: Report | None
    stack: ExitStack

    @property
    def folder(self) -> Path:
        return Path(self.config.output.dir)


@dataclass(frozen=True)
class Machine:
    """What a rank computes with and how it reaches all others; the plans that follow from what both were measured to
    take for `work`, the batch."""

    trace: Trace
    device: Device
    network: Network
    work: Workload
    planner: Planner

    @classmethod
    def measured(cls, run: Run) -> "Machine":
        """Collective over the world. Raises InputError on all ranks."""
        config, world = run.config, run.world
        # The traces' clock is rank 0's, from here on.
        zero = world.broadcast(Trace.now(), "the clocks")
        trace = Trace(world.rank, config.trace.level, world.clock_offset() - zero)
        device = bind(config.model.device, world, exact=config.model.dtype == "float32")
        trace.ranges = device.clock
        m, sampling = config.model, [job.sampling for job in run.batch.todo]
        held = shelves(m.layers, run.cluster.nodes, device.cuda)
        work = workload(run.batch.shape, sampling, m.dtype, config.parallel.batch, held)
        with trace.span("plan", "inter"):
            t, say = config.transport, run.report.log.warning if run.report else lambda text: None
            heap = max(work.symmetric_bytes(), HEAP_BYTES) + on_heap(run.batch.folder, m, held)
            network = Network(world, device, t.kind, t.inter, heap, say)
            transport = network.transport(run.cluster)
            planner = Planner.measured(config, run.cluster, transport, device, work, run.batch.shape.head_dim)
        return cls(trace, device, network, work, planner)

    def forget_peak(self) -> int:
        """Counts the most memory from now on, what was measured with left out; bytes that the process holds."""
        self.device.forget_peak()
        return 0 if self.device.cuda else self.device.peak_bytes()


@dataclass
class Links:
    """Between ranks that render together, by the machine's plan. rows: where they decode together."""

    network: Network
    groups: Groups
    transport: Transport
    halves: Halves | None
    rows: RowDecoder | None = None

    @classmethod
    def between(cls, run: Run, machine: Machine) -> "Links":
        """Collective over the world."""
        network, plan = machine.network, machine.planner.batch
        groups = Groups.cut(run.world, run.cluster, plan.replicas, plan.cfg)
        with machine.trace.span("connect", "inter"):
            return cls(network, groups, network.transport(groups.sequence), groups.halves(network, machine.trace))

    def close(self) -> None:
        """Collective: what is left open would make MPI's end abort."""
        if self.rows:
            self.rows.close()
        if self.halves:
            self.halves.close()
        self.groups.close()
        self.network.close()


def graphed(run: Run, machine: Machine, links: Links) -> bool:
    """Whether passes of the model are replayed as CUDA graphs."""
    m, family = run.config.model, families()[run.batch.folder.family]
    counts = machine.device.kernels.attend_first(getattr(torch, m.dtype), run.batch.shape.head_dim) is not None
    return m.graph and m.layers == "resident" and links.transport.streams and family.graphs(counts)


def load(run: Run, machine: Machine, links: Links) -> Adapter:
    """The model, its layers where they belong. Collective; on InputError or Stopped, raised on all ranks, the links are
    closed."""
    m, apart = run.config.model, run.config.model.layers != "resident"
    how = m.compile, graphed(run, machine, links), apart, machine.planner.work.encoders_apart

    def adapted(folder: ModelFolder) -> PipelineAdapter:
        return PipelineAdapter.load(folder, m.dtype, machine.device.torch, *how)

    with machine.trace.span("load", "io"):
        try:
            adapter = load_model(run.world, run.batch.folder, m, run.stop, adapted)
            if apart:
                shelve(run.cluster, adapter, machine.network, m.layers, run.stop)
        except (InputError, Stopped):
            links.close()
            raise
    return adapter


def engine(run: Run, machine: Machine, links: Links, adapter: Adapter) -> Engine:
    """Everything that renders, ready to. Collective over the world."""
    config, world, report, trace = run.config, run.world, run.report, machine.trace
    todo = _source(run) if report else Listed(())  # before the finisher: what that writes stays claimed
    finisher = _finisher(run, machine, links, adapter)
    checkpoints = _checkpoints(run, links.groups)
    # What belongs to no video is the job's trace.
    events = world.gather(trace.take().tobytes(), 0, "the events of the job")
    if report:
        report.events = np.frombuffer(b"".join(events), EVENT)
    hear, replicas = report.hear if report else None, machine.planner.batch.replicas
    queue = Queue(world, replicas, todo, run.stop, hear, config.failures.max, config.grace_s)
    transport, dtype = links.transport, getattr(torch, config.model.dtype)
    return Engine(
        links.groups.number, links.groups.replica, transport, links.halves, adapter, machine.device, dtype,
        graphed(run, machine, links), lambda shape, below: machine.planner(shape, transport.nodes, below), finisher,
        trace, queue, checkpoints,
    )  # fmt: skip


def _finisher(run: Run, machine: Machine, links: Links, adapter: Adapter) -> Finisher:
    """Sets links.rows where ranks decode together."""
    config, world, device, groups = run.config, run.world, machine.device, links.groups
    beside = Trace(world.rank, config.trace.level, machine.trace.offset, machine.trace.ranges)  # beside the engine's
    links.rows = row_decoder(config.parallel.vae, groups, len(run.batch.todo), adapter, device, beside)
    made_with = priced(machine.planner.costs, machine.work, run.cluster.nodes)
    film = None
    if config.output.video == "mp4":
        tell = run.report.log.info if run.report else lambda text: None
        film = films.encoder(device, run.batch.todo[0].sampling, tell)
    finisher = Finisher(
        adapter,
        device,
        run.folder / "videos",
        Provenance.of(config, run.cluster, run.batch, groups, made_with),
        beside,
        config.output.compression,
        film,
        world.cores,
        config.queue.claims,
        config.grace_s / 2,
        links.rows,
        # Beside a rank that has no peers to wait for, on cores that are all taken, decoding only spoils the caches.
        in_turn=not device.cuda and groups.replica.size == 1 and not world.spare,
    )
    run.stack.callback(finisher.close)
    return finisher


def _checkpoints(run: Run, groups: Groups) -> Checkpoints | None:
    """On the first rank of each group."""
    if groups.replica.rank != 0:
        return None
    model = {"fingerprint": run.batch.folder.fingerprint, "dtype": run.config.model.dtype}
    checkpoints = Checkpoints(run.folder, run.config.checkpoint.seconds, model)
    run.stack.callback(checkpoints.close)
    if groups.number == 0:
        checkpoints.clean(job.id for job in run.batch.done)
    return checkpoints


def _source(run: Run) -> Source:
    """What this run is to render, in its order."""
    todo = batches(run.batch.todo, run.config.parallel.batch or 1)
    if not run.config.queue.claims:
        return Listed(todo)
    with told():
        claims = Claims(run.folder, run_name(), run.config.queue.stale_s)
    shared = Shared(todo, [job.id for job in run.batch.todo], claims)
    run.stack.callback(shared.close)
    notes.warn_of_failures(run.batch, run.folder, run.config.queue.stale_s, run.report)
    return shared

"""One render of a checked batch, on all ranks together: the output folder, what is made in it, how it ended."""

import gc
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from ..cluster import Cluster, World
from ..config import Config
from ..errors import BrokenRun, Stopped
from ..output.catalog import rebuild
from ..output.claims import run_name
from ..output.record import Row
from ..output.store import software
from ..stop import StopRequest
from . import films, notes
from .batch import Batch, as_it_is_now, output_folder
from .memory import keep_freed
from .progress import Report, open_log
from .setup import Links, Machine, Run, engine, graphed, load

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
        run = Run(config, world, cluster, batch, stop, report, stack)
        try:
            if batch.todo:
                _render(run)
            if config.output.video == "mp4":
                _add_films(run)
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
            code = FAILED if report.tally.failed else OK
            notes.summary(folder, report, len(batch.done), config.failures.max)
        return int(world.broadcast(code, "the exit code"))


def _render(run: Run) -> None:
    machine = Machine.measured(run)
    links = Links.between(run, machine)
    before = machine.forget_peak()
    adapter = load(run, machine, links)
    gc.freeze()  # what is there by now stays to the end
    gc.enable()
    if run.report:
        run.report.log.info("device: %s; transport: %s", machine.device.name, links.transport.describe())
        notes.warn_untimed(machine.trace, machine.device, graphed(run, machine, links), run.report)
        notes.warn_float32(machine.device, run.config.model.dtype, run.batch.shape.weights, run.report)
        notes.log_plan(machine.planner, run.report)
        notes.warn_unguided(run.batch, machine.planner.batch.cfg, adapter, run.report)
    loop = engine(run, machine, links, adapter)
    stopped: Stopped | None = None
    try:
        loop.render(run.batch.todo)
    except Stopped as error:  # by all ranks together
        stopped = error
    notes.log_traffic(run.world, links.transport.traffic, run.report)
    planned = machine.planner.memory_bytes + before
    notes.log_memory(run.world, machine.device, machine.network, loop.denoising_bytes, planned, run.report)
    links.close()
    if stopped is not None:
        raise stopped


def _add_films(run: Run) -> None:
    """The MP4 files of videos that were finished without: each rank makes some. Collective."""
    videos, world = run.folder / "videos", run.world
    mine = [job.id for job in run.batch.done][world.rank :: world.size]
    what = "the MP4 files of earlier videos"
    made = world.together(lambda: run.stop.leave(lambda: films.make(videos, films.missing(videos, mine))), what)
    every = world.gather(str(made).encode(), 0, what)
    if run.report and (count := sum(map(int, every))):
        run.report.log.info("MP4 files made of %d videos that were there", count)


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

"""The batch loop: for each job all ranks encode and denoise together; one of them, in turn, decodes and writes."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.executor import Spans
from ..attention.schedule import Shape, check
from ..attention.session import SequenceParallel
from ..cluster import World
from ..errors import Stopped
from ..kernels import cpu
from ..models.base import Adapter
from ..output.trace import EVENT, Trace
from ..planner.search import Plan
from ..stop import StopRequest
from ..transport.base import Transport
from .manifest import Job
from .progress import Report
from .stages import Denoised, Finisher


@dataclass
class Engine:
    """One group's render loop; every rank of the world runs it with the same jobs.

    plan: the layout for a sequence of so many tokens; report: rank 0's.
    """

    world: World
    transport: Transport
    adapter: Adapter
    dtype: torch.dtype
    plan: Callable[[Shape], Plan]
    finisher: Finisher
    trace: Trace
    stop: StopRequest
    report: Report | None
    _session: SequenceParallel | None = None
    _plan: Plan | None = None

    def render(self, jobs: Sequence[Job]) -> None:
        """Renders `jobs` in their order. Raises Stopped when asked to stop; what was denoised by then is written."""
        stopped: Stopped | None = None
        try:
            for n, job in enumerate(jobs):
                self._check_stop()
                self._render(job, owner=n % self.world.size)
        except Stopped as error:  # the only error that all ranks raise together, so that they can still end together
            stopped = error
        self._collect(wait=True)
        if self._session is not None:
            self._session.close()
        if stopped is not None:
            raise stopped

    def _render(self, job: Job, owner: int) -> None:
        started, s = time.perf_counter(), job.sampling
        session = self._open(self.adapter.shape.tokens(s.num_frames, s.height, s.width))
        if self.report:
            self.report.begins(job.id, str(self._plan))
        with self.trace.span("encode", "compute"):
            guided = self.adapter.guided(s.guidance_scale)
            conditions = self.adapter.encode(job.prompt, job.negative_prompt, guided, s.max_sequence_length)
        if self.report and conditions.prompt_cut:
            self.report.log.warning(
                "%s: the last %d tokens of the prompt are beyond sampling.max_sequence_length=%d and have no effect",
                job.id, conditions.prompt_cut, s.max_sequence_length,
            )  # fmt: skip
        noise = self.adapter.noise(s.seed, s.num_frames, s.height, s.width)
        step_start = self.trace.now()

        def on_step(step: int) -> None:
            nonlocal step_start
            self.trace.record("step", "compute", step_start, self.trace.now())
            if self.report:
                self.report.step(job.id, step)
            if step + 1 < s.steps:  # after the last one there is only the writing left
                self._check_stop()
            step_start = self.trace.now()

        latents = self.adapter.denoise(conditions, noise, s.steps, s.guidance_scale, session, on_step)
        events = self.world.gather(self.trace.take().tobytes(), owner, "the events of a video")
        if self.world.rank == owner:
            every = np.concatenate([np.frombuffer(data, EVENT) for data in events])
            self.finisher.submit(Denoised(job, latents, every, started))
        self._collect()

    def _open(self, length: int) -> SequenceParallel:
        """The attention session for sequences of `length` tokens: the last one's, if it fits."""
        if self._session is not None and self._session.shape.length == length:
            return self._session
        if self._session is not None:
            self._session.close()
        shape = Shape(1, length, self.adapter.shape.heads, self.adapter.shape.head_dim)
        self._plan = self.plan(shape)
        schedule = self._plan.schedule()
        check(schedule, self.transport.nodes)
        spans = Spans(self.trace.recorder(level=2), self.trace.now)
        self._session = SequenceParallel(schedule, shape, self.transport, cpu, self.dtype, spans)
        return self._session

    def _check_stop(self) -> None:
        """Raises Stopped on all ranks at the same step if any was asked to stop."""
        if self.world.largest(bool(self.stop.by), "the end of a step"):
            raise Stopped(f"stopped on request{f' ({self.stop.by})' * bool(self.stop.by)}; the same command resumes")

    def _collect(self, wait: bool = False) -> None:
        """Tells rank 0 what has ended on any rank."""
        mine = json.dumps(self.finisher.results(wait)).encode()
        for data in self.world.gather(mine, 0, "the results of videos"):
            for result in json.loads(data):
                assert self.report is not None
                self.report.ended(result["id"], result["status"], result["seconds"], result["reason"])

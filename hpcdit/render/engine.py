"""The render loop of a group: all its ranks encode and denoise together; one of them, in turn, decodes and writes."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.check import check
from ..attention.executor import Spans
from ..attention.schedule import Shape
from ..attention.session import SequenceParallel
from ..device import Device
from ..errors import Stopped
from ..group import Group
from ..models.base import Adapter, Conditions, Halves
from ..output.trace import EVENT, Trace
from ..planner.plans import Plan
from ..transport.base import Transport
from .manifest import Job
from .queue import Queue
from .stages import Denoised, Finisher


@dataclass
class Engine:
    """One group's render loop. Groups share the queue, and wait for each other in the end alone.

    number: of the group; group: the ranks that share videos; transport: between those of them that share sequences;
    halves: where each of two parts computes one prediction of guidance; plan: the layout for a shape.
    """

    number: int
    group: Group
    transport: Transport
    halves: Halves | None
    adapter: Adapter
    device: Device
    dtype: torch.dtype
    plan: Callable[[Shape], Plan]
    finisher: Finisher
    trace: Trace
    queue: Queue
    _session: SequenceParallel | None = None
    _plan: Plan | None = None
    _count: int = 0  # videos that this group has denoised

    @property
    def _leads(self) -> bool:
        return self.group.rank == 0

    def render(self, jobs: Sequence[Job]) -> None:
        """Renders what the queue gives of `jobs`. Raises Stopped, on all ranks, if videos were given up on request;
        what was denoised by then is written. Collective over the world."""
        cut = False
        try:
            while batch := self._next():
                self._check_stop()
                self._render([jobs[position] for position in batch])
        except Stopped:  # the only error that all ranks raise together, so that they can still end together
            cut = True
        self._tell("idle")
        self._collect(wait=True)
        if self._session is not None:
            self._session.close()
        self.queue.end(self._leads, cut)

    def _next(self) -> list[int]:
        return list(self.group.broadcast(self.queue.next() if self._leads else None, "the next videos"))

    def _render(self, jobs: Sequence[Job]) -> None:
        started, s = time.perf_counter(), jobs[0].sampling
        session = self._open(len(jobs), self.adapter.shape.tokens(s.num_frames, s.height, s.width))
        self._tell("begins", ids=[job.id for job in jobs], plan=str(self._plan))
        with self.trace.span("encode", "compute"):
            conditions = stack([self._encode(job) for job in jobs])
        noise = [self.adapter.noise(job.sampling.seed, s.num_frames, s.height, s.width) for job in jobs]
        step_start = self.trace.now()

        def on_step(step: int) -> None:
            nonlocal step_start
            self.transport.await_stream(f"step {step + 1}")
            self.trace.record("step", "compute", step_start, self.trace.now())
            self._tell("step", ids=[job.id for job in jobs], step=step)
            if step + 1 < s.steps:  # after the last one there is only the writing left
                self._check_stop()
            step_start = self.trace.now()

        latents = self.adapter.denoise(
            conditions, torch.cat(noise), s.steps, s.guidance_scale, session, on_step, self.halves
        )
        events = self.trace.take().tobytes()
        for i, job in enumerate(jobs):
            self._hand_over(job, len(jobs), latents[i : i + 1], events, started)
        self._collect()

    def _encode(self, job: Job) -> Conditions:
        limit = job.sampling.max_sequence_length
        guided = self.adapter.guided(job.sampling.guidance_scale)
        conditions = self.adapter.encode(job.prompt, job.negative_prompt, guided, limit)
        if conditions.prompt_cut:
            self._tell("cut", id=job.id, tokens=conditions.prompt_cut, limit=limit)
        return conditions

    def _hand_over(self, job: Job, batch: int, latents: torch.Tensor, events: bytes, started: float) -> None:
        """Gives a denoised video to the rank whose turn it is, with the events of all ranks."""
        owner = self._count % self.group.size
        self._count += 1
        gathered = self.group.gather(events, owner, "the events of a video")
        if self.group.rank == owner:
            every = np.concatenate([np.frombuffer(data, EVENT) for data in gathered])
            assert self._plan is not None
            plan = {**self._plan.describe(), **self.transport.describe(), "batch": batch}
            # A copy: the rest of the batch need not stay in memory for it.
            self.finisher.submit(Denoised(job, plan, latents.to("cpu", copy=True), every, started))

    def _open(self, batch: int, length: int) -> SequenceParallel:
        """The attention session for so many sequences of `length` tokens: the last one's, if it fits."""
        shape = Shape(batch, length, self.adapter.shape.heads, self.adapter.shape.head_dim)
        if self._session is not None:
            if self._session.shape == shape:
                return self._session
            self._session.close()
        self._plan = self.plan(shape)
        schedule = self._plan.schedule()
        check(schedule, self.transport.nodes)
        spans = Spans(self.trace.recorder(level=2), self.trace.now)
        self._session = SequenceParallel(schedule, shape, self.transport, self.device.kernels, self.dtype, spans)
        return self._session

    def _tell(self, what: str, **note: object) -> None:
        if self._leads:
            self.queue.tell(what=what, group=self.number, **note)

    def _check_stop(self) -> None:
        """Raises Stopped on all ranks of the group at the same step if any knows that the run is to stop."""
        if self.group.largest(self.queue.stopping(), "the end of a step"):
            raise Stopped

    def _collect(self, wait: bool = False) -> None:
        """Tells the report what has ended on any rank of the group."""
        mine = json.dumps(self.finisher.results(wait)).encode()
        for data in self.group.gather(mine, 0, "the results of videos"):
            for result in json.loads(data):
                self._tell("ended", **result)


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Several prompts as one batch, in their order."""
    negative = [c.negative for c in conditions if c.negative is not None]
    return Conditions(torch.cat([c.prompt for c in conditions]), torch.cat(negative) if negative else None)

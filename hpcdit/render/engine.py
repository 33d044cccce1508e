"""The render loop of a group: all its ranks encode and denoise together; one of them, in turn, decodes and writes."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.check import check
from ..attention.schedule import Shape
from ..attention.session import SequenceParallel
from ..config import Sampling
from ..device import Device
from ..errors import InputError, Stopped
from ..group import Group
from ..models.base import Adapter, Conditions, Encoding, Snapshot
from ..output.trace import EVENT, Trace
from ..planner.plans import Plan
from ..transport.base import Transport
from .checkpoints import Checkpoints, join, unpack
from .denoising import Denoiser
from .groups import Halves
from .manifest import Job
from .memory import release
from .queue import Queue
from .stages import Denoised, Finisher
from .together import GivenUp, Together


@dataclass
class Engine:
    """One group's render loop. Groups share the queue, and wait for each other in the end alone.

    number: of the group; group: the ranks that share videos; transport: between those of them that share sequences;
    halves: where each of two parts computes one prediction of guidance; graph: whether the adapter replays passes as
    CUDA graphs; plan: the layout for a shape, where bytes are given one that stays below them; checkpoints: on the
    group's first rank.
    """

    number: int
    group: Group
    transport: Transport
    halves: Halves | None
    adapter: Adapter
    device: Device
    dtype: torch.dtype
    graph: bool
    plan: Callable[[Shape, int | None], Plan]
    finisher: Finisher
    trace: Trace
    queue: Queue
    checkpoints: Checkpoints | None
    _session: SequenceParallel | None = None
    _plan: Plan | None = None
    _count: int = 0  # videos that this group has denoised

    def __post_init__(self) -> None:
        self._together = Together(self.group, self.queue.seconds_left, lambda text: self._tell("trace", text=text))
        self._denoise = Denoiser(
            self.adapter, self.transport, self.halves, self.device, self.dtype, self.graph, self._together, self.trace,
            self.checkpoints, lambda ids, step: self._tell("step", ids=ids, step=step), self.finisher.expected_s,
        )  # fmt: skip

    @property
    def _leads(self) -> bool:
        return self.group.rank == 0

    @property
    def denoising_bytes(self) -> int:
        """The most of the device's memory that this rank held while it denoised its first videos; 0: it had none."""
        return self._denoise.peak_bytes

    def render(self, jobs: Sequence[Job]) -> None:
        """Renders what the queue gives of `jobs`. Raises Stopped, on all ranks, if videos were given up on request;
        what was denoised by then is written. Collective over the world."""
        cut = False
        try:
            while batch := self._next():
                self._render([jobs[position] for position in batch])
        except Stopped:  # the only error that all ranks raise together, so that they can still end together
            cut = True
        self._tell("idle")
        self._collect(wait=True)
        if self._session is not None:
            self._session.close()
        self.queue.end(self._leads, cut)

    def _next(self) -> list[int]:
        """Positions of the next videos; empty if there are no more."""
        while (found := self.group.broadcast(self.queue.next() if self._leads else None, "the next videos")) is None:
            self._together.agree()
            self._collect()  # what others hold may take long to be decided
        return list(found)

    def _render(self, jobs: Sequence[Job], below: int | None = None) -> None:
        """Renders videos together; where that fails one by one, and one for which memory is short once more.

        Those of which there are checkpoints go on from there. below: bytes that a rank's plan has to stay below.
        """
        for part, start in self._parts(jobs):
            started = time.perf_counter()
            failure = self._attempt(part, start, below)
            if failure is None:
                continue
            release()
            if len(part) > 1:
                self._tell("again", ids=[job.id for job in part], reason=failure.reason, how="one by one")
                for job in part:
                    self._render([job])
            elif failure.memory and below is None and self._plan is not None:
                self._collect(wait=True)  # what is decoded meanwhile takes memory, too
                how = "by the smallest plan that there is"
                self._tell("again", ids=[part[0].id], reason=failure.reason, how=how)
                self._render(part, self._plan.memory_bytes)
            else:
                seconds = time.perf_counter() - started
                self._tell("ended", id=part[0].id, status="failed", seconds=seconds, reason=failure.reason)

    def _parts(self, jobs: Sequence[Job]) -> list[tuple[list[Job], Snapshot | None]]:
        """The jobs whose denoising goes on from the same step together, with what it goes on from."""
        mine = [self.checkpoints.read(job) for job in jobs] if self.checkpoints else []
        found = dict[int, list[tuple[Job, Snapshot]]]()
        fresh = list[Job]()
        sizes = self.group.broadcast([len(data) for data in mine], "the checkpoints")
        for i, job in enumerate(jobs):
            if not sizes[i]:
                fresh.append(job)
                continue
            snapshot, _ = unpack(self.group.share(mine[i] if mine else b"", "a checkpoint"))
            found.setdefault(snapshot.step, []).append((job, snapshot))
        parts = [([job for job, _ in part], join([at for _, at in part])) for part in found.values()]
        return [*parts, *([(fresh, None)] if fresh else [])]

    def _attempt(self, jobs: Sequence[Job], start: Snapshot | None, below: int | None) -> GivenUp | None:
        """Renders videos together, but for what their owners have yet to finish; or why that is given up."""
        started, s = time.perf_counter(), jobs[0].sampling
        try:
            session = self._open(len(jobs), self._length(s), below)
            step = start.step if start else 0
            self._tell("begins", ids=[job.id for job in jobs], plan=str(self._plan), step=step)
            size = math.prod(self.adapter.shape.latents(s.num_frames, s.height, s.width)) * len(jobs)
            needs_s = self._denoise.needs_s(session, s.steps - step, size)
            with self._together.stage("while encoding", needs_s), self.trace.span("encode", "compute"):
                conditions = stack([self._encode(job) for job in jobs])
                noise = [self.adapter.noise(job.sampling.seed, s.num_frames, s.height, s.width) for job in jobs]
            latents = self._denoise(jobs, conditions, torch.cat(noise), session, start)
            session.spans.read()
        except GivenUp as failure:
            self.trace.take()
            return failure.with_traceback(None)  # which would hold on to all that was computed
        events = self.trace.take().tobytes()
        for i, job in enumerate(jobs):
            self._hand_over(
                job,
                {"batch": len(jobs), "first_step": step, "tokens": session.shape.length},
                latents[i : i + 1],
                events,
                started,
            )
        self._collect()
        return None

    def _length(self, s: Sampling) -> int:
        return self.adapter.shape.length(s.num_frames, s.height, s.width, s.max_sequence_length)

    def _encode(self, job: Job) -> Conditions:
        limit = job.sampling.max_sequence_length
        guided = self.adapter.guided(job.sampling.guidance_scale)
        conditions = self.adapter.encode(job.prompt, job.negative_prompt, guided, limit, job.image)
        if conditions.prompt_cut:
            self._tell("cut", id=job.id, tokens=conditions.prompt_cut, limit=limit)
        return conditions

    def _hand_over(self, job: Job, how: dict[str, int], latents: torch.Tensor, events: bytes, started: float) -> None:
        """Gives a denoised video to the rank whose turn it is, with the events of all ranks, and its rows to all others
        if they decode it together."""
        owner = self._count % self.group.size
        self._count += 1
        gathered = self.group.gather(events, owner, "the events of a video")
        rows = self.finisher.rows
        if rows or self.group.rank == owner:
            every = np.frombuffer(b"".join(gathered), EVENT)
            assert self._plan is not None
            plan = {**self._plan.describe(), **self.transport.describe(), **how, "vae": "rows" if rows else "whole"}
            mine = rows.share(latents) if rows else latents
            # A copy: the rest of the batch need not stay in memory for it.
            self.finisher.submit(Denoised(job, plan, mine.to("cpu", copy=True), every, started, owner))

    def _open(self, batch: int, length: int, below: int | None = None) -> SequenceParallel:
        """The attention session for so many sequences of `length` tokens: the last one's, if it fits.

        below: bytes that the plan stays below if it can. Raises GivenUp where no layout fits into memory.
        """
        shape = Shape(batch, length, self.adapter.shape.heads, self.adapter.shape.head_dim)
        if self._session is not None and self._session.shape == shape and below is None:
            return self._session
        try:
            plan = self.plan(shape, below)
        except InputError as error:
            if below is None or self._plan is None:
                raise GivenUp(str(error)) from None
            plan = self._plan
        if self._session is not None:
            self._session.close()
        self._plan = plan
        schedule = self._plan.schedule()
        check(schedule, self.transport.nodes)
        spans = self.device.spans(self.trace.recorder(level=2), self.trace.now, self.trace.recorder(level=1))
        channels = self.adapter.shape.token_channels
        self._session = SequenceParallel(
            schedule, shape, self.transport, self.device.kernels, self.dtype, spans, channels
        )
        return self._session

    def _tell(self, what: str, **note: object) -> None:
        if self._leads:
            self.queue.tell(what=what, group=self.number, **note)

    def _collect(self, wait: bool = False) -> None:
        """Tells the report what has ended on any rank of the group."""
        mine = json.dumps(self.finisher.results(wait)).encode()
        for data in self.group.gather(mine, 0, "the results of videos"):
            for result in json.loads(data):
                self._tell("ended", **result)
                if self.checkpoints and result["status"] == "done":
                    self.checkpoints.remove(result["id"])
        while self.checkpoints and self.checkpoints.said:
            self._tell("warning", text=self.checkpoints.said.popleft())


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Several prompts as one batch, in their order; they have one picture."""
    negative = [c.negative for c in conditions if c.negative is not None]
    prompt = _stack([c.prompt for c in conditions])
    return Conditions(prompt, _stack(negative) if negative else None, image=conditions[0].image)


def _stack(encodings: Sequence[Encoding]) -> Encoding:
    return {name: torch.cat([encoding[name] for encoding in encodings]) for name in encodings[0]}

"""The steps of one batch of videos, on one rank of its group: what happens at the end of each, and when one fails."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..attention.session import SequenceParallel
from ..device import Device
from ..errors import Stopped
from ..group import FATAL
from ..models.base import Adapter, Conditions, Snapshot
from ..output.trace import Trace
from ..transport.base import Transport
from .checkpoints import Checkpoints
from .groups import Halves
from .manifest import Job, detailed_steps
from .together import GivenUp, Position, Together


@dataclass
class Denoiser:
    """Denoises with what a group has.

    graph: whether the adapter replays passes as CUDA graphs; together: how the group's ranks agree; checkpoints: on its
    first rank; told: takes each step that has ended; finish_s: what decode and write of such latents will take.
    """

    adapter: Adapter
    transport: Transport
    halves: Halves | None
    device: Device
    dtype: torch.dtype
    graph: bool
    together: Together
    trace: Trace
    checkpoints: Checkpoints | None
    told: Callable[[list[str], int], None]
    finish_s: Callable[[int], float]
    peak_bytes: int = 0  # of the device's memory when the first videos were denoised, and none was decoded yet
    _timed: SequenceParallel | None = None  # what the last step was of, and how long the steps of its video took
    _each_s: float = 0.0

    def needs_s(self, session: SequenceParallel, steps: int, numbers: int) -> float:
        """For so many steps, and for decode and write of so many numbers of latents; infinite if there was no step."""
        return self._each_s * steps + self.finish_s(numbers) if self._timed is session else math.inf

    def timed(self, session: SequenceParallel, each_s: float) -> None:
        """What a step takes of the videos at hand."""
        self._timed, self._each_s = session, each_s

    def __call__(
        self,
        jobs: Sequence[Job],
        conditions: Conditions,
        noise: torch.Tensor,
        session: SequenceParallel,
        start: Snapshot | None,
    ) -> torch.Tensor:
        """The latents of all `jobs`. Raises GivenUp or Stopped, on all ranks at the end of the same step."""
        steps, scale = jobs[0].sampling.steps, jobs[0].sampling.guidance_scale
        halves = self.halves if self.adapter.guided(scale) else None
        passes = 2 if self.adapter.guided(scale) and halves is None else 1
        position = Position(session, self.adapter.shape.layers, passes, halves, self.graph)
        session.spans.begin(detailed_steps(jobs[0].sampling, passes * session.spans_of_pass(self.adapter.shape.layers)))
        done = Steps(self, jobs, session, position, start.step if start else 0, noise.numel())
        try:
            seeds, scheduler = tuple(job.sampling.seed for job in jobs), jobs[0].sampling.scheduler
            latents = self.adapter.denoise(
                conditions, noise, steps, scale, session, done, self.halves, start, seeds, scheduler
            )
            self.peak_bytes = self.peak_bytes or self.device.peak_bytes()
            return latents
        except (GivenUp, *FATAL):
            raise
        except Exception as error:
            if done.ended == steps:  # the others have left the loop
                raise
            failure = self.together.failure(error, f"in step {done.ended + 1} of {steps}")
        position.drain(torch.zeros(noise.shape, dtype=self.dtype))
        self.together.agree(failure)
        raise AssertionError("a failure is agreed on")


class Steps:
    """The steps of one batch, as the model calls it at the end of each. ended: how many have."""

    def __init__(
        self,
        denoiser: Denoiser,
        jobs: Sequence[Job],
        session: SequenceParallel,
        position: Position,
        first: int,
        numbers: int,
    ) -> None:
        """first: steps that were done before; numbers: of all latents."""
        self._of, self._jobs, self._session, self._position = denoiser, jobs, session, position
        self._first, self._numbers, self.ended = first, numbers, first
        self._begun, self._start = time.monotonic(), denoiser.trace.start("step")
        if denoiser.checkpoints:
            denoiser.checkpoints.begin()

    def __call__(self, step: int, snapshot: Callable[[], Snapshot]) -> None:
        """Raises GivenUp or Stopped, on all ranks at the end of the same step."""
        of, left = self._of, self._jobs[0].sampling.steps - step - 1
        of.transport.await_stream(f"step {step + 1}")
        of.device.synchronize_stream()  # where transfers go through the host, there is more on it
        of.trace.end("step", "compute", self._start)
        self._session.spans.waited()
        of.told([job.id for job in self._jobs], step)
        if of.checkpoints:
            of.checkpoints.step(self._jobs, snapshot, last=left == 0)
        of.timed(self._session, (time.monotonic() - self._begun) / (step + 1 - self._first))
        try:  # what is denoised is written in any case
            of.together.agree(needs_s=of.needs_s(self._session, left, self._numbers) if left else 0.0)
        except Stopped:
            if of.checkpoints:
                of.checkpoints.write(self._jobs, snapshot)
            raise
        self._position.begin_step()
        self.ended = step + 1
        if left:
            self._start = of.trace.start("step")

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
        ended = first = start.step if start else 0
        session.spans.begin(detailed_steps(jobs[0].sampling, passes * session.spans_of_pass(self.adapter.shape.layers)))
        begun, step_start = time.monotonic(), self.trace.start("step")
        if self.checkpoints:
            self.checkpoints.begin()

        def on_step(step: int, snapshot: Callable[[], Snapshot]) -> None:
            nonlocal ended, step_start
            self.transport.await_stream(f"step {step + 1}")
            self.device.synchronize_stream()  # where transfers go through the host, there is more on it
            self.trace.end("step", "compute", step_start)
            session.spans.waited()
            self.told([job.id for job in jobs], step)
            left = steps - step - 1
            if self.checkpoints:
                self.checkpoints.step(jobs, snapshot, last=left == 0)
            self._timed, self._each_s = session, (time.monotonic() - begun) / (step + 1 - first)
            try:  # what is denoised is written in any case
                self.together.agree(needs_s=self.needs_s(session, left, noise.numel()) if left else 0.0)
            except Stopped:
                if self.checkpoints:
                    self.checkpoints.write(jobs, snapshot)
                raise
            position.begin_step()
            ended = step + 1
            if left:
                step_start = self.trace.start("step")

        try:
            seeds, scheduler = tuple(job.sampling.seed for job in jobs), jobs[0].sampling.scheduler
            latents = self.adapter.denoise(
                conditions, noise, steps, scale, session, on_step, self.halves, start, seeds, scheduler
            )
            self.peak_bytes = self.peak_bytes or self.device.peak_bytes()
            return latents
        except (GivenUp, *FATAL):
            raise
        except Exception as error:
            if ended == steps:  # the others have left the loop
                raise
            failure = self.together.failure(error, f"in step {ended + 1} of {steps}")
        position.drain(torch.zeros(noise.shape, dtype=self.dtype))
        self.together.agree(failure)
        raise AssertionError("a failure is agreed on")

"""How the ranks of a group fail and stop: together, at the end of a stage or of a denoising step, never inside one.

The others of a group wait for a rank's blocks in the middle of a step. So a rank that cannot go on goes through the
rest of the step without computing (`Position.drain`), and at its end all agree on what is next (`Together.agree`).
"""

import json
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.session import SequenceParallel
from ..command_line import one_line
from ..errors import BrokenRun, Stopped
from ..group import FATAL, Group
from .groups import Halves

# torch's allocator for CPUs, and CUDA's libraries, where they have no memory for themselves.
SHORT = "can't allocate memory", "not enough memory", "ALLOC_FAILED"

GOES_ON, STOPS, FAILS = range(3)  # what a rank says at the end of a stage; the largest counts


@dataclass
class GivenUp(Exception):
    """A group gives up the videos at hand: raised on all its ranks. memory: one of them ran out of it."""

    reason: str
    memory: bool = False


@dataclass(frozen=True)
class Failure:
    """What a rank could not survive. trace: where it was, for the log."""

    reason: str
    memory: bool
    trace: str

    @classmethod
    def of(cls, error: BaseException, where: str) -> "Failure":
        """`error` as it was raised; it is not held on to."""
        trace = "".join(traceback.format_exception(error))
        return cls(f"{where}: {told(error)}", short_of_memory(error), trace)


def short_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which torch and Python say so."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in SHORT))


def told(error: BaseException) -> str:
    """An exception on one line."""
    kind = "out of memory" if short_of_memory(error) else type(error).__name__
    return f"{kind}: {text}" if (text := one_line(str(error))) else kind


@dataclass
class Together:
    """What a group's ranks agree on.

    seconds_left: before this rank has to end, infinite where nothing has asked it to; tell: takes what the log should
    say of a failure, on the group's first rank.
    """

    group: Group
    seconds_left: Callable[[], float]
    tell: Callable[[str], None]

    @contextmanager
    def stage(self, what: str, needs_s: float) -> Iterator[None]:
        """All ranks end this stage; what any rank's body raises becomes GivenUp on all. See `agree`."""
        failure: Failure | None = None
        try:
            yield
        except FATAL:
            raise
        except Exception as error:
            failure = self.failure(error, what)
        self.agree(failure, needs_s)

    def failure(self, error: BaseException, what: str) -> Failure:
        """`error` of this rank's, at `what`."""
        return Failure.of(error, f"rank {self.group.members[self.group.rank]} {what}")

    def agree(self, failure: Failure | None = None, needs_s: float = math.inf) -> None:
        """Raises GivenUp on all ranks if any has failed, else Stopped if any has less than `needs_s` before it stops.

        needs_s: for what they are at; 0 where it is to be ended in any case.
        """
        mine = FAILS if failure else STOPS if self.seconds_left() < needs_s else GOES_ON
        found = self.group.largest(mine, "the end of a step")
        if found == FAILS:
            raise self._given_up(failure)
        if found == STOPS:
            raise Stopped

    def _given_up(self, failure: Failure | None) -> GivenUp:
        mine = json.dumps([failure.reason, failure.memory, failure.trace] if failure else None).encode()
        said: list[Any] = [json.loads(data) for data in self.group.gather(mine, 0, "what has failed")]
        found = [entry for entry in said if entry]
        for _, _, trace in found:
            self.tell(trace)
        # What ran out of memory can be helped, whatever else went wrong.
        first = max(found, key=lambda entry: entry[1])[:2] if found else None
        reason, memory = self.group.broadcast(first, "what has failed")
        return GivenUp(reason, memory)


@dataclass
class Position:
    """Where this rank is in a denoising step, as far as others wait for it.

    layers: rounds of attention a pass; passes: of the model, a step; halves: if they swap predictions in each step.
    graph: whether passes are captured, and replayed without this process.
    """

    sequence: SequenceParallel
    layers: int
    passes: int
    halves: Halves | None
    graph: bool
    _before: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        self._before = self.sequence.passes, self.halves.swaps if self.halves else 0

    def drain(self, junk: torch.Tensor) -> None:
        """Ends the step without computing. junk: as large as a prediction.

        Raises BrokenRun where the others replay passes as graphs, of which this rank has none to replay.
        """
        passes, swaps = self._before
        if self.sequence.shared and self.graph and self.sequence.passes > 0:
            raise BrokenRun("a rank failed where the others go on inside a CUDA graph; the same command resumes")
        while self.sequence.passes < passes + self.passes:
            self.sequence.drain(self.layers)
        if self.halves and self.halves.swaps == swaps:
            self.halves.drain(junk)

"""Which group renders what: one queue at rank 0, from which groups take jobs without ever waiting for each other."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..desk import Desk
from ..errors import Stopped
from ..group import Group
from ..stop import StopRequest
from .manifest import Job
from .sources import Source

ASK_S = 0.02  # between two questions for the next videos
GOES_ON, STOPS, STOPS_AT_ONCE = range(3)  # what the desk's bell says
AT_ONCE = "SIGINT"  # who is at the keyboard does not wait


def batches(jobs: Sequence[Job], most: int) -> list[list[int]]:
    """Positions of up to `most` jobs that follow each other and can be denoised together: all but text and seed equal,
    the picture that they start from included.

    fps counts for the file alone.
    """
    found: list[list[int]] = []
    last: tuple[float | str, ...] = ()
    for position, job in enumerate(jobs):
        s = job.sampling
        sizes = s.num_frames, s.height, s.width, s.max_sequence_length
        kind = (*sizes, s.steps, s.guidance_scale, s.scheduler, job.image)
        if found and kind == last and len(found[-1]) < most:
            found[-1].append(position)
        else:
            found.append([position])
        last = kind
    return found


class Queue:
    """One rank's access to the queue of a run; the leader of each group takes from it and tells how it goes.

    A signal to stop, whichever rank it reaches, is told to rank 0, and from there to every rank.
    """

    def __init__(
        self, world: Group, groups: int, todo: Source, stop: StopRequest,
        hear: Callable[[dict[str, Any]], None] | None, most_failures: int | None = None,
        grace_s: float = 0.0,
    ) -> None:  # fmt: skip
        """todo: what to hand out, and `hear`: what to do with notes, in the main thread; on rank 0.

        most_failures: after so many failed videos nothing more is handed out; None: whatever fails. grace_s: seconds
        in which what is under way may still be ended, from when a rank has heard that the run is to stop.

        Collective over the world.
        """
        self._world, self._stop, self._hear = world, stop, hear
        self._left, self._notes = todo, deque[dict[str, Any]]()
        self._working, self._cut, self._by = groups, False, ""
        self._failed, self._most_failures = 0, most_failures
        self._grace_s, self._heard = grace_s, 0.0
        self._told = False
        self._desk = Desk(world)
        self._desk.open(self._answer)

    def _answer(self, note: dict[str, Any]) -> Any:
        """Rank 0's answer, in the service thread or its main thread."""
        match note.pop("kind"):
            case "next":
                return self._left.take() if self._left and not self._by and not self._enough else []
            case "stop":
                self._by = self._by or note["by"]
                self._desk.ring(STOPS_AT_ONCE if self._by == AT_ONCE else STOPS)
            case "end":
                self._cut = self._cut or note["cut"]
                self._working -= 1
            case "note":
                said = note["note"]
                self._notes.append(said)
                failed = said.get("status") == "failed"
                self._failed += failed
                if said.get("what") == "ended":
                    self._left.ended(said["id"], said["reason"] if failed else "")
        return None

    @property
    def _enough(self) -> bool:
        return self._most_failures is not None and self._failed >= self._most_failures

    def next(self) -> list[int] | None:
        """What a leader's group is to render next; empty if nothing is left or the run stops; None: ask again."""
        found = self._desk.ask({"kind": "next"}, "the next videos")
        if found is None:
            time.sleep(ASK_S)
        return found if found is None else list(found)

    def tell(self, **note: Any) -> None:
        """A leader's note for the report of rank 0."""
        self._desk.tell({"kind": "note", "note": note})
        self._listen()

    def _listen(self) -> None:
        while self._notes and self._hear:
            self._hear(self._notes.popleft())

    def stopping(self) -> bool:
        """Whether this rank has heard that the run is to stop, by a signal or from the desk."""
        if self._stop.by and not self._told:
            self._told = True
            self._desk.tell({"kind": "stop", "by": self._stop.by})
        return bool(self._stop.by) or self._desk.rung() > GOES_ON

    def seconds_left(self) -> float:
        """For this rank to end what it is at; infinite unless it has heard that the run is to stop."""
        if not self.stopping():
            return math.inf
        self._heard = self._heard or time.monotonic()
        at_once = self._stop.by == AT_ONCE or self._desk.rung() == STOPS_AT_ONCE
        return 0.0 if at_once else max(0.0, self._heard + self._grace_s - time.monotonic())

    def end(self, leader: bool, cut: bool) -> None:
        """Returns when all groups have ended. Raises Stopped on all ranks if any had to give up videos; collective.

        cut: whether this group gave up what it was at. What is left after too many failures is nobody's wish to stop.
        """
        if leader:
            self._desk.tell({"kind": "end", "cut": cut})
        world, what = self._world, "other groups to end"
        if world.rank == 0:
            world.wait(self._ended, range(world.size), what)
            self._listen()
            self._desk.ring(GOES_ON)
        else:  # a signal that reaches a rank whose group has nothing left is for the others, too
            world.wait(lambda: bool(self.stopping() or self._desk.rung() >= 0), range(world.size), what)
        self._desk.close()
        given_up, by = world.broadcast([self._cut or bool(self._left and not self._enough), self._by], what)
        if given_up:
            raise Stopped(f"stopped on request{f' ({by})' * bool(by)}; the same command resumes")

    def _ended(self) -> bool:
        self._listen()
        self.stopping()
        return self._working == 0

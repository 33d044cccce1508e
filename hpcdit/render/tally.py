"""How far a run is: what it has made, what other runs that share its folder have made, and what is left of both."""

import time
from collections.abc import Iterable, Mapping

from ..output.record import Row


class Tally:
    """Counts videos by how they ended, here or elsewhere, and the steps that are left.

    work: denoising steps of each video that this run is to render unless another does, by id.
    """

    def __init__(self, work: Mapping[str, int]) -> None:
        self.work = work
        self.done, self.failed = 0, 0  # by this run
        self.theirs = dict[str, str]()  # how those ended that other runs have rendered, by id
        self._begun: dict[str, int] = {}  # steps that are done of each video that this run has begun
        self._ended = set[str]()
        self._steps = 0  # that this run has made
        self._were_theirs = set[str]()  # when this run began
        self.start = time.monotonic()  # set anew when the first video begins

    def begins(self, ids: Iterable[str], step: int) -> None:
        """step: as many steps of these videos were done before."""
        self._begun.update(dict.fromkeys(ids, step))
        if not self._steps:
            self.start, self._were_theirs = time.monotonic(), set(self.theirs)

    def step(self, ids: Iterable[str], step: int) -> None:
        """Step `step`, from 0, of these videos has ended."""
        for id in ids:
            self._begun[id] = step + 1
            self._steps += 1

    def ended(self, id: str, done: bool) -> None:
        """A video of this run."""
        self._ended.add(id)
        self.done, self.failed = self.done + done, self.failed + (not done)

    def elsewhere(self, rows: Iterable[Row]) -> None:
        """rows: of the index, which knows what other runs have written."""
        ended = {row.id: row.status for row in rows if row.status != "pending"}
        self.theirs = {id: how for id, how in ended.items() if id in self.work and id not in self._begun}

    @property
    def to_go(self) -> int:
        """Videos that nobody has ended."""
        return len(self.work) - len(self.theirs) - self.done - self.failed

    @property
    def elapsed(self) -> float:
        """Seconds since the first video began."""
        return time.monotonic() - self.start

    @property
    def _left(self) -> int:
        """Steps; of what others are at, nothing is known."""
        return sum(
            steps - self._begun.get(id, 0)
            for id, steps in self.work.items()
            if id not in self._ended and id not in self.theirs
        )

    @property
    def share(self) -> float:
        """Of all steps, those that are not left."""
        return 1 - self._left / max(sum(self.work.values()), 1)

    @property
    def left_s(self) -> float:
        """Seconds until all is done, if all runs go on as they did since this one began; 0 where nothing is known."""
        others = sum(self.work[id] for id, how in self.theirs.items() if how == "done" and id not in self._were_theirs)
        made = self._steps + others
        return self.elapsed / made * self._left if made else 0.0

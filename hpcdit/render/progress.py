"""What a person sees of a run: a log file, and lines on the terminal."""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BrokenRun
from ..output.store import Index
from ..output.trace import EVENT
from ..terminal import say
from .live import At, State, View
from .tally import Tally

LINE_S = 5.0  # between two progress lines where the output is not a terminal


class LogFile(logging.FileHandler):
    """A file that may be on a full disk: what cannot be written is told once, and the run goes on."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            say(f"hpcdit: {self.baseFilename}: cannot be written: {error.strerror}")


def open_log(path: Path) -> logging.Logger:
    """A logger that appends plain lines to `path`."""
    log = logging.getLogger(f"hpcdit.run.{path}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    return log


def clock(seconds: float) -> str:
    """Seconds as people read them: 45 s, 12 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def _as_broken_run() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BrokenRun(f"the index cannot be written: {error.strerror or error}; finished videos are whole") from error


class Report:
    """Rank 0's account of a run: index, log and progress line. On other ranks there is none.

    work: denoising steps of each video to be rendered, by id; what is left is foretold from the steps done.
    """

    def __init__(self, index: Index, log: logging.Logger, work: dict[str, int], there: int) -> None:
        self._index, self.log, self._there = index, log, there
        self.events = np.empty(0, EVENT)  # the job's own trace
        self.tally = Tally(work)
        self._opened, self._shown = time.monotonic(), 0.0
        self._view = View(shutil.get_terminal_size().columns) if sys.stderr.isatty() else None
        self._failures = list[tuple[str, str]]()  # id and reason
        self._at: dict[int, At] = {}  # what each group is at

    def hear(self, note: dict[str, Any]) -> None:
        """Takes what the leader of a group tells."""
        match note:
            case {"what": "begins", "group": group, "ids": ids, "plan": plan, "step": step}:
                self.begins(group, ids, plan, step)
            case {"what": "cut", "id": job_id, "tokens": tokens, "limit": limit}:
                limit = f"sampling.max_sequence_length={limit}"
                what = f"the last {tokens} tokens of the prompt are beyond {limit} and have no effect"
                self.log.warning("%s: %s", job_id, what)
            case {"what": "step", "group": group, "ids": ids, "step": step}:
                self.step(group, ids, step)
            case {"what": "again", "ids": ids, "reason": reason, "how": how}:
                self.log.warning("%s: %s; once more, %s", ", ".join(ids), reason, how)
            case {"what": "warning", "text": text}:
                self.log.warning("%s", text)
            case {"what": "trace", "text": text}:
                self.log.error("%s", text.rstrip())
            case {"what": "ended", "id": job_id, "status": status, "seconds": seconds, "reason": reason}:
                self.ended(job_id, status, seconds, reason)
            case {"what": "idle", "group": group}:
                self._at.pop(group, None)

    def begins(self, group: int, ids: list[str], plan: str, step: int = 0) -> None:
        """step: as many steps of these videos were done before."""
        self._look()
        self.tally.begins(ids, step)
        for job_id in ids:
            how = f"goes on after step {step}" if step else "starts"
            self.log.info("%s: %s%s (%s)", job_id, how, f" in replica {group}" if group else "", plan)

    def step(self, group: int, ids: list[str], step: int) -> None:
        """Step `step` (from 0) of videos that a group renders together has ended."""
        self.tally.step(ids, step)
        more = f" +{len(ids) - 1}" if len(ids) > 1 else ""
        self._at[group] = At(f"{ids[0]}{more}", step + 1, self.tally.work[ids[0]])
        self._show(", ".join(f"{at.videos} step {at.step}/{at.steps}" for _, at in sorted(self._at.items())))

    def ended(self, job_id: str, status: str, seconds: float, reason: str) -> None:
        with _as_broken_run():
            self._index.update(job_id, status, seconds, reason)
        self.tally.ended(job_id, status == "done")
        if status == "done":
            self.log.info("%s: done in %.1f s", job_id, seconds)
        else:
            self.log.error("%s: failed: %s", job_id, reason)
            self._failures.append((job_id, reason))
            if not self._view:
                say(f"{job_id}: failed: {reason}")
        self._show(f"{job_id} {status}", now=True)

    def _look(self) -> None:
        """For what other runs have done."""
        with _as_broken_run():
            looked = self._index.catch_up()
        if looked:
            self.tally.elsewhere(self._index.rows)

    def _show(self, what: str, now: bool = False) -> None:
        tally = self.tally
        if not now and not self._view and tally.elapsed - self._shown < LINE_S:
            return
        self._shown = tally.elapsed
        self._look()
        count = f"{tally.done}/{len(tally.work)} videos"
        count += f", {len(tally.theirs)} by other runs, {tally.to_go} to go" * bool(tally.theirs)
        count += f" ({self._there} were there)" * bool(self._there)
        left = f"{clock(tally.left_s)} left"
        if not self._view:
            say(f"{count}, {what}, {left}")
            return
        hourly = tally.done / tally.elapsed * 3600 if tally.elapsed else 0.0
        rate = f", {f'{hourly:.3g}' if hourly < 999.5 else f'{hourly:.0f}'} videos an hour" * (hourly > 0)
        failed = f", {tally.failed} failed" * bool(tally.failed)
        self._view.show(State(f"{count}{failed}{rate}, {left}", tally.share, self._at, self._failures), now)

    def close(self) -> None:
        """Writes the index."""
        with _as_broken_run():
            self._index.write(self.events)
        self.tally.elsewhere(self._index.rows)
        loading = self.tally.start - self._opened
        self.log.info("videos took %.1f s, after %.1f s of loading", self.tally.elapsed, loading)

    @property
    def seconds(self) -> float:
        """Since the run was set up."""
        return time.monotonic() - self._opened

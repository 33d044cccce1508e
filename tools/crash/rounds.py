"""Rounds: a fault drawn from a seed, and a run that meets it, in the folder of the round before; then one to the end.

Each round adds videos to those that its chain has not done yet, and what its run leaves the next one goes on with.
"""

import contextlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import checks
from .faults import DISK, FAULTS, Expected, Left, Moment, Scene, disk, mounted
from .processes import Program, gone, kill_all

VIDEOS = 4  # that a round adds
METHODS = ("torus", "tas", "usp", "ulysses", "ring")
STALE_S = 3.0
SHARED = 0.3  # of all chains
SMALL = (
    "sampling.num_frames=5", "sampling.height=64", "sampling.width=64", "sampling.steps=4",
    "sampling.max_sequence_length=16", "model.compile=false", "output.compression=none",
)  # fmt: skip
SLACK_S = 5.0  # for a fault to be noticed, beyond transport.timeout_s
LEFT_S = 5.0  # after a run that ended by itself


@dataclass(frozen=True)
class Campaign:
    """What all rounds share. program: the command; expected: the reference's frames by file name.

    pace: seconds that each moment takes; deadline_s: for one start of the program; over: no more is to be started.
    """

    folder: Path
    program: tuple[str, ...]
    ranks: int
    timeout_s: float
    deadline_s: float
    expected: Mapping[str, np.ndarray] = field(default_factory=dict)
    pace: dict[str, float] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def prompts(self, rounds: int) -> Path:
        """The file of what so many rounds of a chain ask for together."""
        return self.folder / f"prompts-{rounds}.txt"

    def write_prompts(self, most: int) -> None:
        """For chains of up to so many rounds."""
        for rounds in range(1, most + 1):
            lines = (f"a red circle, number {n}\n" for n in range(rounds * VIDEOS))
            self.prompts(rounds).write_text("".join(lines))

    def words(self, layout: Sequence[str], rounds: int) -> list[str]:
        given = (
            f"prompts={self.prompts(rounds)}",
            f"output.dir={DISK}/out",
            f"transport.timeout_s={self.timeout_s}",
        )
        return [*self.program, *given, *SMALL, *layout]


@dataclass(frozen=True)
class Round:
    """What is drawn. runs: that share the folder, of `ranks` each; layout: arguments; rank: that is hit, of run 0."""

    seed: int
    fault: str
    moment: Moment
    ranks: int
    runs: int
    launcher: bool
    rank: int
    layout: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int, kinds: Sequence[str], most: int, shared: bool) -> "Round":
        """Kinds come by turns, all else at random. most: ranks; shared: the folder, by two runs where they fit in."""
        drawn, name = random.Random(seed), kinds[seed % len(kinds)]
        fault = FAULTS[name]
        moment = Moment(drawn.choice(fault.at), drawn.random(), drawn.randrange(VIDEOS - 1))
        ranks = drawn.randint(min(fault.ranks, most), most)
        nodes = drawn.choice(_divisors(ranks))
        replicas = drawn.choice(_divisors(ranks))
        cfg = drawn.choice([c for c in (1, 2) if ranks // replicas % c == 0])
        layout = [
            f"cluster.ranks_per_node={ranks // nodes}", f"parallel.replicas={replicas}", f"parallel.cfg={cfg}",
            f"parallel.method={drawn.choice(METHODS)}", f"trace.level={drawn.choice((0, 1, 2))}",
            f"checkpoint.seconds={drawn.choice(('null', 0))}",
        ]  # fmt: skip
        runs = 2 if shared and ranks <= most // 2 and not fault.alone else 1
        layout += ["queue.shared=true", f"queue.stale_s={STALE_S}"] * shared
        return cls(seed, name, moment, ranks, runs, fault.launcher, drawn.randrange(ranks), tuple(layout))

    def __str__(self) -> str:
        shape = "  ".join(word.partition(".")[2] for word in (*self.layout[:4], self.layout[5]))
        return f"{self.ranks} ranks{f' x {self.runs} runs' * (self.runs > 1)}  {shape}"


def chain(seeds: Sequence[int], kinds: Sequence[str], most: int) -> list[Round]:
    """The rounds of these seeds, to be played in one folder."""
    shared = random.Random(f"chain {seeds[0]}").random() < SHARED
    return [Round.draw(seed, kinds, most, shared) for seed in seeds]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@dataclass
class Outcome:
    """seconds: from the fault until nothing of the run that was hit is left; None: the run ended before the moment.

    done: videos that were finished when the fault came; wrong: what should not be.
    """

    round: Round
    seconds: float | None = None
    done: int = 0
    code: int | None = None
    wrong: list[str] = field(default_factory=list)


def play(campaign: Campaign, rounds: Sequence[Round]) -> list[Outcome]:
    """A chain of rounds in a folder of its own, that stays if anything is wrong; one that is ends the chain."""
    outcomes, folder = list[Outcome](), campaign.folder / f"round-{rounds[0].seed}"
    mark = f"{os.getpid()}.{rounds[0].seed}"
    folder.mkdir()
    with ExitStack() as stack:
        stack.enter_context(disk(folder, any(FAULTS[one.fault].disk for one in rounds)))
        stack.callback(kill_all, mark)
        with contextlib.suppress(TimeoutError):
            for one in rounds:
                outcomes.append(Outcome(one))
                _fault(campaign, outcomes, folder, mark)
                if outcomes[-1].wrong:
                    break
            else:
                _resume(campaign, outcomes, folder, mark)
        if outcomes[-1].wrong and mounted(folder / DISK):  # what is to be looked at would go with the disk
            shutil.copytree(folder / DISK, folder / "kept")
    return outcomes


def _start(campaign: Campaign, outcomes: Sequence[Outcome], folder: Path, mark: str, name: str) -> list[Program]:
    """The runs of the last round."""
    if campaign.over.is_set():
        raise TimeoutError
    drawn, words = outcomes[-1].round, campaign.words(outcomes[-1].round.layout, len(outcomes))
    said = [folder / f"{drawn.seed}-{name}-{run}.txt" for run in range(drawn.runs)]
    return [Program(words, drawn.ranks, drawn.launcher, folder, f"{mark}.{run}", file) for run, file in enumerate(said)]


def _fault(campaign: Campaign, outcomes: Sequence[Outcome], folder: Path, mark: str) -> None:
    outcome, out = outcomes[-1], folder / DISK / "out"
    drawn, fault = outcome.round, FAULTS[outcome.round.fault]
    left, there = Left.by(out), checks.hashes(out)
    hit, *others = _start(campaign, outcomes, folder, mark, "fault")
    scene = Scene(folder, hit, drawn.rank, drawn.ranks * drawn.runs, left, VIDEOS * len(outcomes))
    deadline = time.monotonic() + campaign.deadline_s
    if not drawn.moment.come(scene, campaign.pace, deadline):
        _end(outcome, hit, campaign.deadline_s, Expected((0,)), "the run")
        for other in others:
            _end(outcome, other, campaign.deadline_s, Expected((0,)), "a run beside it")
        outcome.wrong += checks.unchanged(there, out) + checks.whole(out, campaign.expected)
        return
    before = checks.hashes(out)
    outcome.done = len(before)
    began = time.monotonic()
    expected = fault.hit(scene)
    late = drawn.moment.name == "end"
    limit = campaign.deadline_s if fault.slow else campaign.timeout_s + SLACK_S
    try:
        _end(outcome, hit, limit, expected, "the run", late)
    finally:
        outcome.seconds = time.monotonic() - began
    for other in others:
        _end(outcome, other, campaign.deadline_s, expected if fault.others else Expected((0,)), "a run beside it")
    fault.undo(scene)
    outcome.wrong += checks.unchanged({**there, **before}, out) + checks.whole(out, campaign.expected)


def _end(outcome: Outcome, run: Program, within_s: float, expected: Expected, who: str, late: bool = False) -> None:
    """Checks how a run ends. late: all was done when the fault came, so that it may have ended well."""
    until = time.monotonic() + within_s
    code = run.wait(within_s)
    outcome.code = code if who == "the run" else outcome.code
    if code is None or not gone(run.mark, max(until - time.monotonic(), LEFT_S if not code else 0)):
        outcome.wrong.append(f"{who} {'hangs' if code is None else 'left a process over'} after {within_s:.0f} s")
        kill_all(run.mark)
        raise TimeoutError
    if code == 0 and (late or 0 in expected.codes):
        return
    if code not in expected.codes if expected.codes else code == 0:
        outcome.wrong.append(f"{who} ended with {code}, not {expected.codes or 'an error'}")
    if code != 0 and not re.search(expected.says, run.said):
        outcome.wrong.append(f"{who} did not say {expected.says!r}")


def _resume(campaign: Campaign, outcomes: Sequence[Outcome], folder: Path, mark: str) -> None:
    """The last round's command once more, to the end of all that the chain has asked for."""
    out, last = folder / DISK / "out", outcomes[-1]
    before = checks.hashes(out)
    for run in _start(campaign, outcomes, folder, mark, "resume"):
        _end(last, run, campaign.deadline_s, Expected((0,)), "the resumed run")
    if last.code is not None and not out.exists():
        last.wrong.append("the resumed run made no output folder")
        return
    last.wrong += checks.unchanged(before, out) + checks.whole(out, campaign.expected)
    videos = VIDEOS * len(outcomes)
    expected = dict(sorted(campaign.expected.items())[:videos])
    last.wrong += checks.complete(out, expected, len(before) == videos)

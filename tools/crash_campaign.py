"""Breaks runs of the program at random moments, and looks whether anything is lost: see `--help`.

    python tools/crash_campaign.py --rounds 300 --seed 1

Each round draws a fault, a moment, a rank and a layout from its seed, starts the program on a small batch, lets the
fault happen, and checks that the run ends in time, with the exit code and the message that fit, and leaves no process;
and that no finished video is lost, damaged or changed. `--chain` rounds follow each other in one folder: each asks for
some videos more, and goes on with what the one before has left. At last the same command completes the batch, equal to
a reference that was rendered without faults, and leaves nothing else in the folder.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.crash import checks
from tools.crash.faults import DISK, FAULTS, finished, log, no_small_disk
from tools.crash.processes import POLL_S, Program, kill_all
from tools.crash.rounds import VIDEOS, Campaign, Outcome, Round, chain, play

WRITE_S, END_S = 0.002, 0.3  # how long a video is being written, and a run ending


def main(words: Sequence[str] | None = None) -> int:
    given = arguments(words)
    signal.signal(signal.SIGTERM, _interrupted)
    kinds = given.kinds or list(FAULTS)
    if (why := no_small_disk()) and (left := [kind for kind in kinds if not FAULTS[kind].disk]) != kinds:
        print(f"left out: {', '.join(kind for kind in kinds if kind not in left)}: {why}")
        kinds = left
    kinds = [kind for kind in kinds if FAULTS[kind].ranks <= given.ranks]
    if not kinds:
        print("crash_campaign: no fault is left to be drawn", file=sys.stderr)
        return 2
    folder = Path(given.folder or tempfile.mkdtemp(prefix="hpcdit-crash-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # costs that are measured in the middle of faults stay here
    program = tuple(shlex.split(given.program))
    campaign = Campaign(folder, program, given.ranks, given.timeout_s, given.deadline_s)
    again = f"python tools/crash_campaign.py --kinds {' '.join(kinds)} --ranks {given.ranks} --chain {given.chain}"
    outcomes = list[Outcome]()
    try:
        campaign = _reference(campaign, given.chain)
        end = given.seed + given.rounds
        seeds = [range(first, min(first + given.chain, end)) for first in range(given.seed, end, given.chain)]
        for played in _played(campaign, [chain(some, kinds, given.ranks) for some in seeds], given.jobs):
            outcomes += played
            _tell(played, folder, again, given.keep)
    finally:
        kept = given.keep or len(outcomes) < given.rounds or any(outcome.wrong for outcome in outcomes)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(outcomes))
    return int(any(outcome.wrong for outcome in outcomes))


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Breaks runs of the program at random moments, and looks whether anything is lost."
    )
    add = parser.add_argument
    add("--rounds", type=int, default=20, help="default: %(default)s")
    add("--seed", type=int, default=1, help="of the first round, the next ones count on; default: %(default)s")
    add("--chain", type=int, default=4, help="rounds that follow each other in one folder; default: %(default)s")
    add("--ranks", type=int, default=4, help="at most, in a round; default: %(default)s")
    add("--kinds", nargs="+", choices=list(FAULTS), metavar="FAULT", help=f"default: all of {', '.join(FAULTS)}")
    add("--jobs", type=int, default=1, help="chains at the same time; default: %(default)s")
    add("--timeout-s", type=float, default=5, help="transport.timeout_s of the runs; default: %(default)s")
    add("--deadline-s", type=float, default=240, help="for a start of the program to end; default: %(default)s")
    add("--folder", help="for the rounds; default: a new one for temporary files")
    add("--keep", action="store_true", help="keep the folders of rounds where all was well, too")
    add("--program", default=f"{shlex.quote(sys.executable)} -m hpcdit", help="what is started; default: %(default)s")
    given = parser.parse_args(words)
    if min(given.rounds, given.ranks, given.jobs, given.chain) < 1:
        parser.error("--rounds, --chain, --ranks and --jobs must be at least 1")
    return given


def _played(campaign: Campaign, chains: Sequence[Sequence[Round]], jobs: int) -> Iterator[list[Outcome]]:
    """What comes of the chains, `jobs` at a time; when this is left early, they are ended."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(play, campaign, one) for one in chains]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            campaign.over.set()
            while not all(future.done() for future in futures):
                kill_all(str(os.getpid()))
                time.sleep(POLL_S)


def _interrupted(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _reference(campaign: Campaign, rounds: int) -> Campaign:
    """The campaign with the frames that are right in chains of so many rounds, and how long the parts of a run take."""
    campaign.write_prompts(rounds)
    videos = VIDEOS * rounds
    folder = Path(tempfile.mkdtemp(prefix="reference-", dir=campaign.folder))
    out, mark = folder / DISK / "out", f"{os.getpid()}.0"
    said = folder / "said.txt"
    began = time.monotonic()
    run = Program(campaign.words((), rounds), 1, False, folder, mark, said)
    try:
        times = {}
        for name, words in (("start", ", pid "), ("load", ": starts"), ("end", " videos done in ")):
            while words not in log(out) and not run.ended() and time.monotonic() < began + campaign.deadline_s:
                time.sleep(POLL_S)
            times[name] = time.monotonic() - began
        if run.wait(campaign.deadline_s) != 0 or len(finished(out)) != videos:
            raise SystemExit(f"crash_campaign: the run without faults failed: {run.said}")
    finally:
        kill_all(mark)
    load, denoise = times["load"] - times["start"], (times["end"] - times["load"]) / videos
    pace = {"start": times["start"], "load": load, "denoise": denoise, "write": WRITE_S, "end": END_S}
    print(f"reference: {videos} videos in {times['end']:.1f} s; rounds in {campaign.folder}", flush=True)
    return replace(campaign, expected=checks.reference(out), pace=pace)


def _tell(played: Sequence[Outcome], folder: Path, again: str, keep: bool) -> None:
    first = played[0].round.seed
    place = folder / f"round-{first}"
    for outcome in played:
        drawn = outcome.round
        when = "ended before" if outcome.seconds is None else f"{outcome.seconds:5.1f} s"
        what = f"{drawn.seed:5}  {drawn.fault:8}  {drawn.moment.name:7}  {when:>12}  code {outcome.code!s:4}"
        print(f"{what}  {outcome.done:2} done  {'FAILED' if outcome.wrong else 'ok':6}  {drawn}", flush=True)
        for line in outcome.wrong:
            print(f"       {line}")
        if outcome.wrong:
            print(f"       {place}; again: {again} --rounds {len(played)} --seed {first}", flush=True)
    if not keep and not any(outcome.wrong for outcome in played):
        shutil.rmtree(place)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a fault: rounds, those that it came in time for, the longest time to notice it, what went wrong."""
    lines = [f"{'fault':10}{'rounds':>7}{'met':>6}{'seconds, longest':>18}{'failed':>8}"]
    names = [name for name in FAULTS if any(outcome.round.fault == name for outcome in outcomes)]
    for name in [*names, "all faults"]:
        these = [outcome for outcome in outcomes if name in ("all faults", outcome.round.fault)]
        met = [outcome.seconds for outcome in these if outcome.seconds is not None]
        failed = sum(bool(outcome.wrong) for outcome in these)
        lines.append(f"{name:10}{len(these):7}{len(met):6}{max(met, default=0):18.1f}{failed:8}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

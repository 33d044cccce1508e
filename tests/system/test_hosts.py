"""The program on hosts that share nothing but a network: right frames, one clock, and an end when a host is lost."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.require import needs
from tests.system.hosts import SKEW_S, Hosts, RunningOnHosts, missing
from tests.system.program import finished, prompts, run

pytestmark = needs("netns", missing())

QUICK = ("sampling.num_frames=5", "sampling.max_sequence_length=16", "parallel.replicas=1", "parallel.cfg=1")
CAPTIONS = ("a red circle moving left on black", "a blue star growing on grey")
CLOCK_S = 0.01  # by which two hosts' clocks may differ in a trace; a round trip takes a hundredth of it


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(3, tmp_path) as hosts:
        yield hosts


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(2, tmp_path) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    ended = run(None, *quick(folder), "output.dir=out", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder / "out"


def quick(folder: Path, steps: int = 2) -> tuple[str, ...]:
    return (f"prompts={prompts(folder / 'p.txt', CAPTIONS)}", f"sampling.steps={steps}", *QUICK)


def check(out: Path, alone: Path, ranks: int) -> None:
    """Frames are those of one rank, and the times of all ranks fit together."""
    paths = sorted((out / "videos").glob("*.h5"))
    assert len(paths) == 2
    for path in paths:
        with h5py.File(path) as here, h5py.File(alone / "videos" / path.name) as there:
            assert np.abs(here["frames"][:].astype(int) - there["frames"][:]).max() <= 1
            events = here["trace/events"][:]
        assert set(events["rank"]) == set(range(ranks))
        steps = events[events["name"] == b"step"]
        first, second = (np.array([np.sort(steps[steps["rank"] == r])[i] for r in range(ranks)]) for i in (0, 1))
        # All ranks end a step before any begins the next one.
        assert first["end"].max() <= second["start"].min() + CLOCK_S
        assert events["end"].max() - events["start"].min() < SKEW_S / 10


def test_three_hosts_give_the_frames_of_one_rank_on_one_clock_over_both_wires(
    three: Hosts, alone: Path, tmp_path: Path
) -> None:
    for wire in ("rma", "persistent"):
        args = (*quick(tmp_path), f"output.dir={wire}", f"transport.inter={wire}")
        ended = run(three.mpirun(3, per_host=1), *args, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert f"'inter': '{wire}'" in (tmp_path / wire / "run.log").read_text()
        check(tmp_path / wire, alone, ranks=3)


def test_two_hosts_give_the_frames_of_one_rank_however_their_ranks_are_dealt_out(
    two: Hosts, alone: Path, tmp_path: Path
) -> None:
    """per_host=1 deals the ranks out like cards: hosts 0, 1, 0, 1."""
    for per_host, wire in ((2, "rma"), (1, "persistent")):
        args = (*quick(tmp_path), f"transport.inter={wire}")
        with RunningOnHosts(two, two.mpirun(4, per_host), *args, cwd=tmp_path, out=wire) as program:
            code, _ = program.ended(100)
            assert code == 0, program.said
            places = program.places()
        assert [places[rank][:2] for rank in range(4)] == [(0, "host0"), (0, "host0"), (1, "host1"), (1, "host1")]
        check(tmp_path / wire, alone, ranks=4)


def test_a_rank_killed_on_another_host_ends_the_run_at_once_with_4(two: Hosts, tmp_path: Path) -> None:
    rows = [{"prompt": CAPTIONS[0], "steps": 2}, {"prompt": CAPTIONS[1], "steps": 200}]
    file = prompts(tmp_path / "p.jsonl", [json.dumps(row) for row in rows])
    args = (f"prompts={file}", *QUICK)
    with RunningOnHosts(two, two.mpirun(4, per_host=2), *args, cwd=tmp_path) as program:
        program.until(r"00001\S+: starts")
        while not (before := finished(program.out)):
            assert program.process.poll() is None, program.said
            time.sleep(0.05)
        os.kill(program.pids()[3], signal.SIGKILL)
        code, seconds = program.ended(70)
        assert code == 4 and seconds < 10, program.said
        assert "rank 3 (host host1" in program.said and "SIGKILL" in program.said
        assert "Traceback" not in program.said
        assert program.nobody_left()
    assert before == finished(program.out)
    for name in before:
        with h5py.File(program.out / "videos" / name) as file:
            assert file["frames"].shape == (5, 96, 96, 3)


@pytest.mark.parametrize("lost", ["stopped", "cut off"])
def test_a_rank_that_falls_silent_on_another_host_is_named_and_ends_the_run_with_4(
    lost: str, two: Hosts, tmp_path: Path
) -> None:
    timeout_s = 4
    args = (*quick(tmp_path, steps=200), f"transport.timeout_s={timeout_s}")
    with RunningOnHosts(two, two.mpirun(2, per_host=1), *args, cwd=tmp_path) as program:
        program.until(r"step \d+/200")
        if lost == "stopped":
            os.kill(program.pids()[1], signal.SIGSTOP)
        else:
            two.cut_off(1)
        code, seconds = program.ended(60)
        assert code == 4 and seconds < timeout_s + 5, program.said
        assert "no sign of life from rank 1" in program.said and "while waiting for" in program.said
        assert program.nobody_left()

"""Several runs on one folder: nothing is rendered twice at once, nothing is left, whoever dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hpcdit.output.claims import FOLDER, Claims, failures, run_name
from hpcdit.render.sources import Shared
from tests.unit.test_store import ROOT

LONG = 100.0  # seconds that no test takes


def claims(folder: Path, name: str, stale_s: float = LONG) -> Claims:
    (folder / "videos").mkdir(exist_ok=True)
    return Claims(folder, name, stale_s)


def age(folder: Path, seconds: float) -> None:
    """As if nobody had renewed the claims for so long."""
    for path in (folder / FOLDER).glob("[!.]*"):
        os.utime(path, (time.time() - seconds,) * 2)


def finish(folder: Path, id: str) -> None:
    (folder / "videos" / f"{id}.h5").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).glob("[!.]*"))


def test_a_video_is_claimed_by_one_run_and_by_another_when_it_is_released(tmp_path: Path) -> None:
    one, two = claims(tmp_path, "one"), claims(tmp_path, "two")
    assert one.take("a.1") and not two.take("a.1") and two.take("a")
    assert names(tmp_path) == ["a.0", "a.1.0"] and '"run": "one"' in (tmp_path / FOLDER / "a.1.0").read_text()
    one.release("a.1")
    assert two.take("a.1")
    for run in (one, two):
        run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["videos"], "the last one leaves nothing"


def test_a_finished_video_is_nobodys(tmp_path: Path) -> None:
    one = claims(tmp_path, "one")
    finish(tmp_path, "a")
    assert not one.take("a") and names(tmp_path) == []
    one.close()


def test_a_claim_that_is_not_renewed_is_taken_over_once(tmp_path: Path) -> None:
    dead, *living = [claims(tmp_path, name) for name in ("dead", "b", "c", "d")]
    assert dead.take("a")
    age(tmp_path, LONG - 5)
    assert not any(run.take("a") for run in living)
    age(tmp_path, LONG + 5)
    assert [run.take("a") for run in living] == [True, False, False] and names(tmp_path) == ["a.1"]
    age(tmp_path, LONG + 5)
    assert living[2].take("a") and names(tmp_path) == ["a.2"]
    dead.release("a")  # it was only suspended
    assert names(tmp_path) == ["a.2"], "what others hold is never removed"
    for run in (dead, *living):
        run.close()


def test_a_run_that_looked_too_early_withdraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw a void claim; before it acts, another run takes that over, or takes it over, ends and lets a third in."""
    dead, slow, quick = [claims(tmp_path, name) for name in ("dead", "slow", "quick")]
    make = slow._make

    def take_over() -> None:
        assert quick.take("a") and names(tmp_path) == ["a.1"]

    def fail_and_retry() -> None:
        take_over()
        quick.release("a")
        assert quick.take("a") and names(tmp_path) == ["a.0"]

    def end() -> None:
        take_over()
        quick.release("a")
        finish(tmp_path, "a")

    def late(act: Callable[[], None], path: Path) -> None:
        act()
        make(path)

    for act in (take_over, fail_and_retry, end):
        assert dead.take("a")
        age(tmp_path, LONG + 5)
        monkeypatch.setattr(slow, "_make", partial(late, act))
        assert not slow.take("a")
        monkeypatch.setattr(slow, "_make", make)
        for run in (dead, quick):
            run.release("a")
        assert names(tmp_path) == []
    for run in (dead, slow, quick):
        run.close()


def test_claims_are_renewed_while_their_run_lives(tmp_path: Path) -> None:
    one, two = claims(tmp_path, "one", 0.5), claims(tmp_path, "two", 0.5)
    assert one.take("a")
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert not two.take("a")
        time.sleep(0.05)
    one.close()
    assert two.take("a")
    two.close()


def test_hosts_whose_clocks_are_wrong_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = claims(tmp_path, "one"), claims(tmp_path, "two")
    assert one.take("a")
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert not two.take("a")
    for run in (one, two):
        run.close()


def test_what_dead_runs_leave_is_swept(tmp_path: Path) -> None:
    one, two = claims(tmp_path, "one"), claims(tmp_path, "two")
    assert one.take("a") and one.take("b")
    finish(tmp_path, "a")
    os.utime(tmp_path / FOLDER / ".one", (1, 1))
    two.close()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["b.0"]
    one.close()


def drain(source: Shared) -> list[int]:
    found = []
    while (batch := source.take()) != []:
        found += batch or []
        time.sleep(0.001)
    return found


def test_a_run_leaves_the_living_alone_and_waits_for_the_silent(tmp_path: Path) -> None:
    silent, living = claims(tmp_path, "silent", 2.0), claims(tmp_path, "living", 2.0)
    silent._closed.set()  # renews nothing any more
    assert silent.take("a") and living.take("b")
    source = Shared([[0], [1], [2]], ["a", "b", "c"], claims(tmp_path, "mine", 2.0))
    start = time.monotonic()
    assert drain(source) == [2, 0] and not source
    assert 1.5 < time.monotonic() - start < 20
    source.close()
    living.close()
    silent.close()


def test_of_a_batch_what_others_have_is_left_out(tmp_path: Path) -> None:
    other = claims(tmp_path, "other")
    assert other.take("b")
    finish(tmp_path, "d")
    source = Shared([[0, 1, 2], [3]], ["a", "b", "c", "d"], claims(tmp_path, "mine"))

    def end() -> None:
        finish(tmp_path, "b")
        other.release("b")

    threading.Timer(0.5, end).start()
    assert drain(source) == [0, 2]
    source.close()
    other.close()


def test_a_video_that_fails_in_one_run_is_tried_by_no_other_but_by_one_that_comes_later(tmp_path: Path) -> None:
    one, two = claims(tmp_path, "one"), claims(tmp_path, "two")
    assert one.take("a")
    source = Shared([[0], [1]], ["a", "b"], two)
    threading.Timer(0.3, one.fail, ("a", "no picture")).start()
    assert drain(source) == [1], "the end is not waited for in vain"
    source.ended("b", "not numbers")
    source.close()
    assert failures(tmp_path) == {"a": "no picture", "b": "not numbers"}
    three = claims(tmp_path, "three")
    assert not three.take("a") and not three.take("b")
    three.close()
    one.close()
    assert not (tmp_path / FOLDER).exists()
    four = claims(tmp_path, "four")
    assert four.take("a")
    four.fail("a", "again")
    (tmp_path / FOLDER / ".four").unlink()  # it is killed
    five = claims(tmp_path, "five")
    assert five.take("a")
    five.close()


def test_a_killed_run_of_this_host_keeps_no_failures_of_others_or_of_its_own(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    name = run_name().rpartition("-")[0]
    runs = {f"{name}-{process.pid}": True, f"another_host-{process.pid}": False, f"{name}-1": False}
    for elsewhere, tried in runs.items():
        killed = claims(tmp_path, elsewhere)
        assert killed.take("a")
        killed.fail("a", "no picture")
        killed._closed.set()  # and never closed
        again = claims(tmp_path, "again")
        assert again.take("a") == tried, elsewhere
        again.close()
        (tmp_path / FOLDER / "a.failed").unlink(missing_ok=True)
        (tmp_path / FOLDER / f".{elsewhere}").unlink(missing_ok=True)


WORKER = """
import os, sys, time
from pathlib import Path
from hpcdit.output.claims import Claims
from hpcdit.render.sources import Shared
folder, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ids = [f"v{i}" for i in range(count)]
source = Shared([[i] for i in range(count)], ids, Claims(folder, name, 2.0))
while (batch := source.take()) != []:
    for i in batch or []:
        with open(folder / "log", "a") as log:
            print(name, "begins", ids[i], file=log)
        time.sleep(0.02)
        os.close(os.open(folder / "videos" / f"{ids[i]}.h5", os.O_CREAT | os.O_EXCL))
        source.ended(ids[i], "")
    time.sleep(0.001)
source.close()
"""


def test_six_runs_one_of_them_killed_render_all_and_nothing_twice_but_what_was_killed(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    count, log = 200, tmp_path / "log"
    runs = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), f"r{n}", str(count)], cwd=ROOT) for n in range(6)
    ]
    try:
        deadline = time.monotonic() + 60
        while "r3 begins" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        runs[3].send_signal(signal.SIGKILL)
        assert [run.wait(60) for run in runs] == [0, 0, 0, -signal.SIGKILL, 0, 0]
    finally:
        for run in runs:
            run.kill()
    assert len(list((tmp_path / "videos").iterdir())) == count
    begun = [line.split() for line in log.read_text().splitlines()]
    times = Counter(id for *_, id in begun)
    twice = {id for id, n in times.items() if n > 1}
    assert len(times) == count and max(times.values()) <= 2
    assert twice <= {id for name, _, id in begun if name == "r3"}, "but what the killed one had begun"
    assert not (tmp_path / FOLDER).exists()


def test_the_name_of_a_run_is_its_jobs_hosts_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    plain = run_name()
    assert plain.endswith(f"-{os.getpid()}") and "/" not in plain
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert run_name() == f"12-{plain}"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run_name() == f"10_3-{plain}"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "../3")
    assert run_name() == f"12-{plain}"

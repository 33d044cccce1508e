"""Several runs of the program on one output folder: shares, claims, one that is killed."""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import h5py

from tests.system.program import ENV, Running, command, finished, prompts, run, statuses

COUNT = 40
TINY = ("sampling.num_frames=1", "sampling.height=32", "sampling.width=32", "sampling.steps=2", "model.compile=false")
SHORT = ("sampling.max_sequence_length=16", "trace.level=1", "parallel.replicas=1", "parallel.cfg=1")


def started(folder: Path, *args: str) -> subprocess.Popen[str]:
    file = prompts(folder / "p.txt", [f"a red circle, number {n}" for n in range(COUNT)])
    line = command(None, f"prompts={file}", "output.dir=out", *TINY, *SHORT, *args)
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=ENV, stdout=pipe, stderr=pipe, text=True)


def begun(folder: Path) -> dict[str, list[str]]:
    """The videos that each run began, by its log."""
    logs = sorted((folder / "out").glob("run-*.log"))
    return {log.name: [line.split()[3] for line in log.read_text().splitlines() if ": starts" in line] for log in logs}


def killed(runs: list[subprocess.Popen[str]]) -> None:
    for process in runs:
        process.kill()
        process.wait()


def test_three_runs_share_a_folder_and_what_a_killed_one_held_is_taken_over(tmp_path: Path) -> None:
    runs = [started(tmp_path, "queue.shared=true", "queue.stale_s=5") for _ in range(3)]
    try:
        deadline = time.monotonic() + 240
        victim = None
        while victim is None:
            assert time.monotonic() < deadline and all(process.poll() is None for process in runs)
            time.sleep(0.02)
            victim = next((name for name, ids in begun(tmp_path).items() if ids), None)
        # Its guard's process is ours; the name ends in that of the work.
        os.kill(int(victim.removesuffix(".log").rpartition("-")[2]), signal.SIGKILL)
        said = [process.communicate(timeout=240) for process in runs]
    finally:
        killed(runs)
    assert sorted(process.returncode for process in runs) == [0, 0, 4], said
    assert len(finished(tmp_path / "out")) == COUNT
    times = Counter(id for ids in begun(tmp_path).values() for id in ids)
    assert len(times) == COUNT
    assert {id for id, n in times.items() if n > 1} <= set(begun(tmp_path)[victim])
    assert sum(status == "done" for status, _ in statuses(tmp_path / "out").values()) == COUNT
    with h5py.File(tmp_path / "out" / "job.h5") as job:
        assert len(job["videos"]) == COUNT and all("frames" in video for video in job["videos"].values())
    assert not (tmp_path / "out" / "claims").exists()


def test_shares_are_by_position_and_a_folder_is_shared_by_all_or_by_none(tmp_path: Path) -> None:
    runs = [started(tmp_path, f"queue.share={i}/3") for i in (1, 2, 3)]
    try:
        deadline = time.monotonic() + 240
        while not any(begun(tmp_path).values()):
            assert time.monotonic() < deadline and all(process.poll() is None for process in runs)
            time.sleep(0.02)
        alone = run(None, f"prompts={tmp_path / 'p.txt'}", "output.dir=out", *TINY, *SHORT, cwd=tmp_path)
        assert alone.returncode in (0, 2), alone.stderr
        if alone.returncode:  # the others had not ended
            assert "another run is writing there; allowed: another output.dir, or queue.shared=true" in alone.stderr
        said = [process.communicate(timeout=240) for process in runs]
    finally:
        killed(runs)
    assert [process.returncode for process in runs] == [0, 0, 0], said
    shares = sorted({int(id[:5]) % 3 for id in ids} for ids in begun(tmp_path).values())
    assert sorted(map(sorted, shares)) == [[0], [1], [2]]
    assert sum(len(ids) for ids in begun(tmp_path).values()) == COUNT == len(finished(tmp_path / "out"))
    assert sum(status == "done" for status, _ in statuses(tmp_path / "out").values()) == COUNT


def test_a_run_that_waits_for_a_silent_one_tells_what_it_has_done_and_stops_on_request(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.jsonl", [f'{{"prompt": "a circle", "id": "{id}"}}' for id in ("here", "there", "bad")])
    (tmp_path / "out" / "claims").mkdir(parents=True)
    for name in ("there.0", ".another_host-1"):
        (tmp_path / "out" / "claims" / name).touch()
    (tmp_path / "out" / "claims" / "bad.failed").write_text("no picture")
    with Running(2, f"prompts={file}", "queue.shared=true", *TINY, *SHORT, cwd=tmp_path) as program:
        program.until(
            "1 of the videos failed in runs that are still at work .* not tried again: bad; a run that starts"
        )
        program.until("1/3 videos, 1 by other runs, 1 to go, here done")
        deadline = time.monotonic() + 30
        while (tmp_path / "out" / "claims" / "here.0").exists():
            assert time.monotonic() < deadline, "it is released"
            time.sleep(0.05)
        (log,) = (tmp_path / "out").glob("run-*.log")
        os.kill(int(re.findall(r"rank 1: .* pid (\d+)", log.read_text())[0]), signal.SIGTERM)
        code, _ = program.ended(60)
        assert code == 75, program.said
    bad = "failed", "no picture"
    assert statuses(tmp_path / "out") == {"here": ("done", ""), "there": ("pending", ""), "bad": bad}
    left = sorted(path.name for path in (tmp_path / "out" / "claims").iterdir())
    assert left == [".another_host-1", "bad.failed", "there.0"]

"""Benchmarks on tiny models: that of families computes what diffusers does, that of scaling goes on whatever fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.bench.scaling_rows import read
from tools.crash.processes import MARK, kill_all, marked

ROOT = Path(__file__).parents[2]


def test_every_variant_of_a_step_gives_the_output_of_diffusers(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", "2", sys.executable, "tools/bench/families.py"]
    options = ["--small", "--turns", "1", "--only", "qwen-image", "--variants", "hpcdit,Ulysses"]
    made = subprocess.run(
        [*command, *options, "--json", str(rows)], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    last = {row["variant"]: row for row in map(json.loads, rows.read_text().splitlines()) if row["final"]}
    ours = {"hpcdit, 1 GPU", "hpcdit, 2 GPUs", "hpcdit, one sequence"}
    assert set(last) == {"diffusers", "diffusers, Ulysses 2", *ours}
    for name, row in last.items():
        assert not row["error"] and row["difference"] < 1e-5 and row["whole_s"] is not None, f"{name}: {row}"
    assert last["hpcdit, one sequence"]["difference"] > 0  # of another order of additions


def test_scaling_goes_on_behind_what_fails(tmp_path: Path) -> None:
    path, mark = tmp_path / "rows.csv", f"scaling-{tmp_path.name}"
    options = ["--ranks", "2", "--small", "--only", "attention,steps", "--csv", str(path)]
    command = [sys.executable, "tools/bench/scaling.py", *options, "--lengths", f"128,{10**13}"]  # 20 PB of q
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, MARK: mark}, stderr=subprocess.PIPE, text=True
    ) as bench:
        try:
            end = time.monotonic() + 120
            while not any(row.what == "attention" for row in read(path).values()) and time.monotonic() < end:
                time.sleep(0.02)
            rank = next(each for each in marked(mark) if each.rank == 1)
            os.kill(rank.pid, signal.SIGKILL)  # as the kernel does when memory is short
            said = bench.communicate(timeout=240)[1]
        finally:
            kill_all(mark)
    assert bench.returncode == 1 and "scaling_groups.py: ended with" in said, said
    rows = list(read(path).values())
    failed = [row for row in rows if not row.seconds]
    unfit = [row for row in failed if "allocate" in row.note]
    assert {row.case for row in unfit} == {f"L={10**13} H=8"}
    assert len(failed) - len(unfit) <= 1  # that of the rank that was killed, unless it died between two
    steps = {(row.ranks, row.asked) for row in rows if row.what == "step"}
    assert steps in ({(2, "auto"), (1, "auto"), (2, cfg)} for cfg in ("cfg 1", "cfg 2"))
    layouts = [(1, 1, "ulysses 1 x 1"), (2, 1, "ulysses 2 x 1"), (2, 1, "ring 1 x 2"), (2, 2, "torus 2 x 1")]
    asked = {*layouts, (1, 1, "auto"), (2, 1, "auto"), (2, 2, "auto")}
    assert {(row.ranks, row.nodes, row.asked) for row in rows if row.case == "L=128 H=8"} == asked

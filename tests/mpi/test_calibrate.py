"""Costs measured by ranks under mpirun."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_all_ranks_have_the_same_costs_and_the_next_run_has_them_too(tmp_path: Path) -> None:
    """On nodes of one, of two, and on a single one of three ranks."""
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", "3", sys.executable]
    command += ["-m", "tests.mpi.under_mpi", "tests.mpi.calibrate", "costs"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    (result,) = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    for measured, kept, traffic in json.loads(result.removeprefix("RESULT ")):
        assert measured == [measured[0]] * 3 == kept
        costs = measured[0]
        assert all(value > 0 for link in ("inter", "intra") for value in costs[link].values())
        assert 1e8 < costs["attention_flops"] < 1e14 and 1e8 < costs["matmul_flops"] < 1e14
        assert 1e-8 < costs["call_s"] < 1 and 1e7 < costs["copy_bytes_per_s"] < 1e13
        assert 1e8 < costs["memory_bytes"] < 1e14 and costs["lanes"] == 1
        assert traffic == {"intra": 0, "inter": 0}  # what is measured counts for no video
    assert len(list((tmp_path / "hpcdit").iterdir())) == 3  # a file a cluster

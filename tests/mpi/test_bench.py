"""Benchmarks on tiny models: that of families computes what diffusers does, and that of scaling has all its rows."""

import csv
import json
import subprocess
import sys
from pathlib import Path

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


def test_scaling_has_a_row_for_every_number_of_ranks(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--small", "--videos", "0", "--csv", str(tmp_path / "rows.csv")]
    command = [sys.executable, "tools/bench/scaling.py", *options]
    made = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert made.returncode == 0 and "ended with" not in made.stderr, made.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [(row["what"], row["ranks"], float(row["milliseconds"]) > 0) for row in csv.DictReader(file)]
    assert {("attention", "1", True), ("attention", "2", True), ("step", "1", True), ("step", "2", True)} == set(rows)

"""Seconds and memory of the demo by rank count, and what tracing costs.

usage: python tools/bench/render.py [--ranks 1 2 4] [--repeats 3]

Each line is the median of the repeats. `start` is what a run takes beside the videos: imports, MPI, loading. Runs with
and without a trace alternate, so that whatever else the machine does falls on both.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Seconds and memory of the demo by rank count, and the trace's cost.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(words)
    print(f"{os.cpu_count()} cores, four videos of 33 x 96 x 96, 10 guided steps")
    print("ranks  nodes x ranks  videos s  whole s  start s  peak GiB a rank")
    for ranks in arguments.ranks:
        for per_node in sorted({ranks, max(ranks // 2, 1)}, reverse=True):
            runs = [render(ranks, per_node, 2) for _ in range(arguments.repeats)]
            videos, whole, peak = (statistics.median(column) for column in zip(*runs, strict=True))
            layout = f"{-(-ranks // per_node)} x {per_node}"
            print(
                f"{ranks:5}  {layout:>13}  {videos:8.1f}  {whole:7.1f}  {whole - videos:7.1f}  {peak:15.2f}", flush=True
            )
    pairs = [[render(2, 1, level)[0] for level in (0, 1, 2)] for _ in range(2 * arguments.repeats)]
    none, stages, all_spans = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"trace, 2 ranks on 2 nodes: level 0 {none:.2f} s, level 1 {stages / none - 1:+.1%},"
        f" level 2 {all_spans / none - 1:+.1%} (median of {len(pairs)})"
    )
    return 0


def render(ranks: int, per_node: int, level: int) -> tuple[float, float, float]:
    """Seconds for the videos, seconds in all, and GiB of the largest rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(BIN / "mpirun"), "-n", str(ranks), sys.executable, "-m", "hpcdit", f"output.dir={folder}/out"]
        start = time.perf_counter()
        subprocess.run([*command, f"cluster.ranks_per_node={per_node}", f"trace.level={level}"], check=True,
                       capture_output=True)  # fmt: skip
        whole = time.perf_counter() - start
        log = Path(folder, "out", "run.log").read_text()
    seconds, peak = re.search(r"videos took ([\d.]+) s", log), re.search(r"peak memory: ([\d.]+) GiB", log)
    assert seconds and peak, log
    return float(seconds[1]), whole, float(peak[1])


if __name__ == "__main__":
    sys.exit(main())

"""Memory of the ranks by the number of videos that a run has made, and seconds until the first one begins.

usage: python tools/bench/many.py [--videos 3000] [--ranks 1] [--rows 12] [KEY=VALUE ...]

Tiny videos of the demo model, a step each, no two prompts alike. A run is flat where the last rows say what those
after the first hundreds say. Started again with --folder, it shows what a start costs that finds the videos there.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
TINY = ("sampling.num_frames=1", "sampling.height=32", "sampling.width=32", "sampling.steps=1", "trace.level=2")
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory of the ranks by the number of videos that a run has made.")
    parser.add_argument("--videos", type=int, default=3000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="an output folder to keep; else one that is removed")
    parser.add_argument("keys", nargs="*")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        return measure(arguments, arguments.folder or Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> int:
    """Runs the program and prints a row each time that a share of the videos is there. Returns its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, log = folder / "prompts.txt", folder / "out" / "run.log"
    prompts.write_text("".join(f"a red circle that is number {n} of many\n" for n in range(arguments.videos)))
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hpcdit", f"prompts={prompts}", f"output.dir={folder / 'out'}", *TINY]
    start, rows = time.perf_counter(), Rows(arguments.videos, arguments.rows)
    mpirun = [str(BIN / "mpirun"), "-n", str(arguments.ranks)]
    with (folder / "said.txt").open("w+") as said:
        run = subprocess.Popen([*mpirun, *command, *arguments.keys], stdout=said, stderr=said)
        try:
            while run.poll() is None:
                time.sleep(0.1)
                if log.exists():
                    rows.see(log, time.perf_counter() - start)
        finally:
            run.kill()
        if run.returncode:
            said.seek(0)
            print("".join(said.readlines()[-5:]), file=sys.stderr)
    return run.returncode


class Rows:
    """Follows a log, and prints a row whenever the next share of `videos` is done."""

    def __init__(self, videos: int, rows: int) -> None:
        self._every = max(videos // rows, 1)
        self._read, self._done, self._next = 0, 0, 1
        self._pids: list[int] = []

    def see(self, log: Path, seconds: float) -> None:
        with log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
            self._read = file.tell()
        self._pids += [int(pid) for pid in re.findall(rb"rank \d+: node .* pid (\d+)", new)]
        if there := re.search(rb"videos: (\d+) to do, (\d+) there", new):
            print(f"{there[1].decode()} to do, {there[2].decode()} there, after {seconds:.1f} s")
        self._done += new.count(b": done in ")
        if self._done >= self._next:
            mib = " ".join(map(memory, self._pids))
            print(f"{self._done:6} videos {seconds:8.1f} s  MiB by rank: {mib}", flush=True)
            self._next = self._done - self._done % self._every + self._every


def memory(pid: int) -> str:
    """What a process holds of its own, files and shared memory apart."""
    try:
        resident, shared = (int(pages) for pages in Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    except OSError:
        return "-"
    return f"{(resident - shared) * PAGE_MIB:.1f}"


if __name__ == "__main__":
    sys.exit(main())

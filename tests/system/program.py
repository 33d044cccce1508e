"""Starting the program as users do, and looking at what it leaves."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import h5py

BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

Start = int | Sequence[str] | None


def command(start: Start, *args: str) -> list[str]:
    """The command line: under mpirun with so many ranks, without it, or under a command that starts ranks."""
    if isinstance(start, int):
        start = [str(BIN / "mpirun"), "-n", str(start)]
    return [*(start or ()), sys.executable, "-m", "hpcdit", *args]


def run(start: Start, *args: str, cwd: Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end, in `cwd`."""
    return subprocess.run(command(start, *args), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout_s)


class Running:
    """The program while it runs; killed with all its ranks if a test leaves it."""

    def __init__(self, start: Start, *args: str, cwd: Path, out: str = "out") -> None:
        self.out, self._said = cwd / out, cwd / "said.txt"
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                command(start, f"output.dir={out}", *args), cwd=cwd, env=ENV, stdout=said, stderr=said
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        for pid in self.pids().values():
            if alive(pid):
                os.kill(pid, 9)
        self.process.wait()

    @property
    def log(self) -> str:
        path = self.out / "run.log"
        return path.read_text() if path.exists() else ""

    @property
    def said(self) -> str:
        return self._said.read_text()

    def places(self) -> dict[int, tuple[int, str, int]]:
        """(node, host, process) of each rank, as the log names them."""
        found = re.findall(r"rank (\d+): node (\d+), host (\S+), pid (\d+)", self.log)
        return {int(rank): (int(node), host, int(pid)) for rank, node, host, pid in found}

    def pids(self) -> dict[int, int]:
        """The process of each rank."""
        return {rank: pid for rank, (_, _, pid) in self.places().items()}

    def until(self, pattern: str, timeout_s: float = 120) -> None:
        """Waits until the log or the output says `pattern`."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.log + self.said):
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said}"
            assert time.monotonic() < deadline, f"never said {pattern}: {self.log}{self.said}"
            time.sleep(0.05)

    def ended(self, timeout_s: float) -> tuple[int, float]:
        """The exit code, and the seconds until it came."""
        start = time.monotonic()
        return self.process.wait(timeout_s), time.monotonic() - start


def alive(pid: int) -> bool:
    """Whether the process is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finished(out: Path) -> dict[str, str]:
    """Hashes of the finished videos, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "videos").glob("*.h5"))}


def statuses(out: Path) -> dict[str, tuple[str, str]]:
    """(status, reason) of each job, by id, as job.h5 has them."""
    with h5py.File(out / "job.h5") as file:
        return {row["id"].decode(): (row["status"].decode(), row["reason"].decode()) for row in file["jobs"]}


def prompts(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path

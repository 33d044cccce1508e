"""One start of the program and all its processes, found by a mark in their environment, whoever their parent is."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "HPCDIT_CRASH_ROUND"
BIN = Path(sys.executable).parent
POLL_S = 0.01
KILLED_S = 10.0  # for what was killed to be gone


@dataclass(frozen=True)
class Process:
    """rank: as the launcher numbers it, None for the launcher's own."""

    pid: int
    parent: int
    name: str
    rank: int | None


def marked(mark: str) -> list[Process]:
    """The living processes that carry `mark`, or a mark that begins with it and a dot."""
    pattern = re.compile(rf"(?:^|\0){MARK}={re.escape(mark)}(?:\.[\d.]+)?\0".encode())
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if not pattern.search(environment):
                continue
            stat = Path(f"/proc/{pid}/stat").read_text()
            name, _, rest = stat.partition("(")[2].rpartition(") ")
            state, parent = rest.split()[:2]
            rank = re.search(rb"(?:^|\0)PMI_RANK=(\d+)\0", environment)
            if state not in "ZX":
                found.append(Process(pid, int(parent), name, int(rank[1]) if rank else None))
    return found


def gone(mark: str, within_s: float) -> bool:
    """Whether nothing that carries `mark` is left, after `within_s` at most."""
    end = time.monotonic() + within_s
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def kill_all(mark: str) -> None:
    """Ends everything that carries `mark`, at once."""
    end = time.monotonic() + KILLED_S
    while (left := marked(mark)) and time.monotonic() < end:
        for process in left:
            send(process.pid, signal.SIGKILL)
        time.sleep(POLL_S)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Program:
    """A run of `ranks` ranks that has been started in `folder`; what it says goes to `said`."""

    def __init__(self, words: Sequence[str], ranks: int, launcher: bool, folder: Path, mark: str, said: Path) -> None:
        """launcher: one rank goes under mpirun, too."""
        under = [str(BIN / "mpirun"), "-n", str(ranks)] if launcher or ranks > 1 else []
        self.mark, self.ranks, self.launched, self._said = mark, ranks, bool(under), said
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        with said.open("ab") as file:
            self.process = subprocess.Popen(
                [*under, *words],
                cwd=folder,
                env={**os.environ, "PATH": path, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, within_s: float) -> int | None:
        """The exit code; None if there is none in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(within_s)
        return None

    def rank(self, number: int) -> tuple[int | None, int | None]:
        """(guard, work) of a rank: what was started first, and its child; None where there is none yet."""
        own = [p for p in marked(self.mark) if p.rank == (number if self.launched else None)]
        pids = {process.pid for process in own}
        guard = next((p.pid for p in own if p.parent not in pids), None)
        return guard, next((p.pid for p in own if p.parent == guard), None)

    def all_work(self) -> list[int]:
        return [pid for pid in (self.rank(number)[1] for number in range(self.ranks)) if pid]

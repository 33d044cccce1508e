"""Jobs on a Slurm cluster of this machine's own, submitted as users do; see tools/slurm_cluster.sh."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.system.program import ENV, finished

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "slurm_cluster.sh"
SCRIPT = ROOT / "jobs" / "render.sbatch"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, for Slurm's daemons"
    lacks = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    return f"no {lacks[0]} (Debian: slurm-wlm, munge)" if lacks else ""


class Slurm:
    """The cluster, from `with` on until its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The nodes share this machine's cores.
        self.env = {**ENV, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def tool(self, what: str) -> str:
        """What tools/slurm_cluster.sh says."""
        return self.run("bash", str(TOOL), what, str(self.folder))

    def __enter__(self) -> Self:
        self.tool("up")
        return self

    def __exit__(self, *exc: object) -> None:
        self.tool("down")

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command says; Slurm's own find the cluster."""
        ended = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
        return ended.stdout.strip()

    def processes(self) -> list[str]:
        """Those that were started with the cluster's configuration: its daemons, and what its jobs run."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_CONF={self.folder}/slurm.conf".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except OSError:  # ended meanwhile
                continue
        return found


class Job:
    """The shipped script with its three lines changed, submitted in `cwd`; cancelled if a test leaves it."""

    def __init__(
        self, slurm: Slurm, *args: str, cwd: Path, options: Sequence[str] = (), tasks: int = 1, launch: str = ""
    ) -> None:
        """options: sbatch's; tasks: of each of the two nodes; launch: what is written there instead of srun."""
        lines = {
            r"^#SBATCH --nodes=.*$": f"#SBATCH --nodes=2 --ntasks-per-node={tasks} --time=00:20:00",
            r"^source .*$": f"source '{sys.prefix}/bin/activate' || exit 2",
        }
        if launch:
            lines[r"^launch=.*$"] = f"launch=({launch} python -m hpcdit)"
        text = SCRIPT.read_text()
        for line, mine in lines.items():
            (theirs,) = re.findall(line, text, re.MULTILINE)
            text = text.replace(theirs, mine)
        (cwd / "mine.sbatch").write_text(text)
        self._slurm, self.cwd, self.out = slurm, cwd, cwd / "out"
        self.id = slurm.run("sbatch", "--parsable", *options, "mine.sbatch", *args, cwd=cwd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.state() not in OVER:
            self.run("scancel")
            self.until(lambda: self.state() in OVER)

    def run(self, *command: str) -> str:
        """What a command of Slurm's that takes the job's id as its last word says."""
        return self._slurm.run(*command, self.id)

    def about(self, key: str, task: str = "") -> str:
        """What scontrol says of the job, or of a task of an array."""
        said = self._slurm.run("scontrol", "--oneliner", "show", "job", self.id + task)
        return dict(re.findall(r"(\w+)=(\S*)", said))[key]

    def state(self, task: str = "") -> str:
        return self.about("JobState", task)

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.cwd.glob("hpcdit-*.out")))

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.out.glob("run*.log")))

    def until(self, true: Callable[[], object], timeout_s: float = 150) -> None:
        """Waits until `true` is."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self._slurm.run('squeue')}\n{self.said}\n{self.log}")
            time.sleep(0.2)

    def until_over(self, task: str = "") -> str:
        """The state that the job ends in, or a task of an array."""
        self.until(lambda: self.state(task) in OVER, 300)
        return self.state(task)

    def until_log(self, pattern: str) -> None:
        def there() -> bool:
            assert self.state() not in OVER, self.said
            return bool(re.search(pattern, self.log))

        self.until(there)

    def finished(self) -> dict[str, str]:
        return finished(self.out)


class LongJob(Job):
    """A job that has finished one video, and is at the next for as many steps: for minutes, if nothing else is said."""

    SHORT, LONG, INSTEAD = ({"id": name, "prompt": "a red circle moving left on black"} for name in "abc")

    def __init__(self, slurm: Slurm, *args: str, cwd: Path, steps: int = 1000) -> None:
        self._prompts = cwd / "p.jsonl"
        self._write(self.SHORT, {**self.LONG, "steps": steps, "num_frames": 33})
        super().__init__(slurm, "prompts=p.jsonl", "output.dir=out", *args, cwd=cwd)
        self.until_log(r"\bb: starts")
        self.until(lambda: self.finished())
        self.before = self.finished()

    def _write(self, *rows: dict[str, object] | dict[str, str]) -> None:
        self._prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def requeued_then_finishes(self, instead: bool = True) -> None:
        """Checks that the job lines up again and does the rest; instead: another video than it was at, a short one."""
        self.until(lambda: self.about("Restarts") == "1")
        assert self.finished() == self.before
        if instead:
            self._write(self.SHORT, self.INSTEAD)
        self.run("scontrol", "update", "TimeLimit=20", "JobId")  # a test may have set it short
        assert self.until_over() == "COMPLETED", self.said
        assert (
            list(self.finished()) == ["a.h5", "c.h5" if instead else "b.h5"]
            and self.before.items() <= self.finished().items()
        )
        assert "1 video done" in self.said and "1 were there" in self.said

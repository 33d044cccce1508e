"""Shell scripts: what shellcheck finds, and when the script of jobs/ has its job requeued (Slurm is stood in for)."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.require import needs

ROOT = Path(__file__).parents[2]
RENDER = ROOT / "jobs" / "render.sbatch"
SCRIPTS = [RENDER, ROOT / ".ci" / "run", *ROOT.glob("tools/*.sh")]

shellcheck = needs("shellcheck", "" if shutil.which("shellcheck") else "shellcheck is not installed")


@shellcheck
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    # SC1091: .venv/bin/activate is not the repository's.
    found = subprocess.run(
        ["shellcheck", "--external-sources", "--exclude=SC1091", str(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


class Slurm:
    """The script with srun, squeue and scontrol that are this test's, in a folder of their own."""

    def __init__(self, folder: Path, srun: str, state: str = "RUNNING", **env: str) -> None:
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").write_text(f'PATH={folder}:"$PATH"\n')
        for name, text in (("srun", srun), ("squeue", f"echo {state}"), ("scontrol", 'echo "scontrol $*"')):
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        self.folder = folder
        outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.env = {**outside, "SLURM_JOB_ID": "7", **env}

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(RENDER), *args], cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.mark.parametrize(
    "code, restarts, state, requeued",
    [
        (0, "", "RUNNING", False),
        (2, "", "RUNNING", False),
        (3, "", "RUNNING", False),
        (4, "", "RUNNING", True),
        (4, "4", "RUNNING", True),
        (4, "5", "RUNNING", False),
        (4, "", "COMPLETING", False),  # the node is lost: Slurm requeues
        (75, "", "RUNNING", True),
        (75, "90", "RUNNING", True),
        (75, "", "CANCELLED", False),
        (128, "", "RUNNING", False),
        (137, "", "RUNNING", True),
        (143, "5", "RUNNING", False),
    ],
)
def test_the_job_is_requeued_where_the_rest_is_worth_it(
    code: int, restarts: str, state: str, requeued: bool, tmp_path: Path
) -> None:
    job = Slurm(tmp_path, f"exit {code}", state, SLURM_RESTART_COUNT=restarts).start()
    said, errors = job.communicate(timeout=20)
    assert job.returncode == code and errors == ""
    assert ("scontrol requeue 7" in said) == requeued, said
    assert bool(said) == requeued


def test_arguments_reach_the_program_as_they_are_and_arrays_share(tmp_path: Path) -> None:
    words = ("prompts=a b.txt", "$(touch x)", "`touch x`; touch x", "*")
    job = Slurm(tmp_path, r"""printf '<%s>\n' "$@" """, SLURM_CPUS_PER_TASK="3").start(*words)
    said = job.communicate(timeout=20)[0]
    expected = ("--mpi=pmi2", "--cpus-per-task=3", "python", "-m", "hpcdit", *words)
    assert said.splitlines() == [f"<{word}>" for word in expected]
    assert not (tmp_path / "x").exists()
    again = Slurm(tmp_path / "array", """echo "$*" """, SLURM_ARRAY_TASK_ID="0").start("seed=1")
    assert again.communicate(timeout=20)[0].endswith("hpcdit queue.shared=true seed=1\n")


@pytest.mark.parametrize("sent, heard", [(signal.SIGUSR1, "USR1"), (signal.SIGTERM, "")])
def test_the_time_limit_is_told_to_the_ranks_and_their_code_is_waited_for(
    sent: signal.Signals, heard: str, tmp_path: Path
) -> None:
    # scancel tells every process of the job, and so the script need not.
    srun = "trap 'said=USR1' USR1; touch started; for i in {1..8}; do sleep .1; done; echo end$said; exit 75"
    job = Slurm(tmp_path, srun).start()
    end = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    job.send_signal(sent)
    said, _ = job.communicate(timeout=20)
    assert job.returncode == 75 and said.startswith(f"end{heard}\n") and "scontrol requeue 7" in said


def test_without_its_environment_nothing_starts(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "touch started")
    (tmp_path / ".venv" / "bin" / "activate").unlink()
    job = slurm.start()
    assert job.wait(20) == 2 and not (tmp_path / "started").exists()


def test_three_lines_are_marked_for_the_user() -> None:
    assert re.findall(r"^# (\d)\. ", RENDER.read_text(), re.MULTILINE) == ["1", "2", "3"]

"""The script of jobs/ under a real Slurm: several nodes, arrays, the time limit, preemption, ranks that die."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from tests.require import needs
from tests.system.program import prompts
from tests.system.slurm import Job, LongJob, Slurm, missing

pytestmark = needs("slurm", missing())

QUICK = ("parallel.replicas=1", "parallel.cfg=1", "parallel.method=usp", "sampling.steps=2", "sampling.num_frames=5",
         "sampling.max_sequence_length=16")  # fmt: skip
CAPTIONS = ("a red circle moving left on black", "a blue star growing on grey")
KILL_S = 15  # KillWait of the cluster


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def test_a_cluster_comes_up_once_and_leaves_nothing(tmp_path: Path) -> None:
    with Slurm(tmp_path / "cluster") as cluster:
        before = (tmp_path / "cluster" / "slurm.conf").read_text()
        job = cluster.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
        end = time.monotonic() + 20
        while len([words for words in cluster.processes() if "sleep 1000" in words and "srun" not in words]) < 2:
            assert time.monotonic() < end, cluster.processes()
            time.sleep(0.1)
        assert cluster.tool("up") == f"export SLURM_CONF={tmp_path}/cluster/slurm.conf"
        assert (tmp_path / "cluster" / "slurm.conf").read_text() == before
        assert re.search(rf"{job} +normal +wrap +RUNNING", cluster.tool("status"))
        cluster.tool("down")
        assert not list(tmp_path.iterdir()) and not cluster.processes()


@pytest.mark.parametrize("launch, tasks", [("", 2), ("mpirun", 1)])
def test_two_nodes_render_by_srun_and_by_mpirun(launch: str, tasks: int, slurm: Slurm, tmp_path: Path) -> None:
    prompts(tmp_path / "p.txt", CAPTIONS)
    with Job(slurm, "prompts=p.txt", "output.dir=out", *QUICK, cwd=tmp_path, tasks=tasks, launch=launch) as job:
        assert job.until_over() == "COMPLETED", job.said
        assert re.findall(r"rank \d: node (\d)", job.log) == [str(rank // tasks) for rank in range(2 * tasks)]
        assert job.said.count("2 videos done") == 1 and len(job.finished()) == 2


def test_the_tasks_of_an_array_share_the_videos(slurm: Slurm, tmp_path: Path) -> None:
    prompts(tmp_path / "p.txt", CAPTIONS * 2)
    options = ("--array=0-1", "--nodes=1")
    with Job(slurm, "prompts=p.txt", "output.dir=out", *QUICK, cwd=tmp_path, options=options) as job:
        for task in ("_0", "_1"):
            assert job.until_over(task) == "COMPLETED", job.said
        counts = [int(count) for count in re.findall(r"(\d) videos? done in", job.said)]
        assert len(counts) == 2 and sum(counts) == 4, job.said
        assert len(job.finished()) == 4 and len(list(job.out.glob("run*.log"))) == 2


def test_bad_input_is_one_line_and_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    with Job(slurm, "prompts=none.txt", cwd=tmp_path) as job:
        assert job.until_over() == "FAILED"
        assert job.about("ExitCode") == "2:0" and job.about("Restarts") == "0"
        assert re.fullmatch(r"hpcdit: prompts=?.*none\.txt.*", job.said.splitlines()[0])
        assert job.said.count("hpcdit: ") == 1 and "requeued" not in job.said


def test_a_killed_rank_costs_a_restart(slurm: Slurm, tmp_path: Path) -> None:
    with LongJob(slurm, *QUICK, cwd=tmp_path) as job:
        os.kill(int(re.findall(r"rank 1: .* pid (\d+)", job.log)[-1]), signal.SIGKILL)
        job.requeued_then_finishes()
        assert "killed by SIGKILL" in job.said and "no sign of life" not in job.said, "others are told at once"
        assert re.search("exit code (4|137), requeued", job.said)  # srun kills the rest and may tell of that


def test_a_preempted_job_goes_on_later_at_the_step_where_it_was(slurm: Slurm, tmp_path: Path) -> None:
    with LongJob(slurm, *QUICK, "grace_s=0", cwd=tmp_path, steps=60) as job:
        slurm.run("sbatch", "--wait", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
        job.requeued_then_finishes(instead=False)
        (step,) = re.findall(r"\bb: goes on after step (\d+)", job.log)
        with h5py.File(job.out / "videos" / "b.h5") as video:
            assert 0 < json.loads(video.attrs["plan"])["first_step"] == int(step) < 60
        assert "stopped on request (SIGTERM)" in job.said and "exit code 75, requeued" in job.said


def test_a_job_stops_before_its_time_limit_and_goes_on_later(slurm: Slurm, tmp_path: Path) -> None:
    with LongJob(slurm, *QUICK, cwd=tmp_path) as job:
        hours, minutes, seconds = map(int, job.about("RunTime").split(":"))
        limit = hours * 60 + math.floor(minutes + seconds / 60) + 2  # which is less than the script's 120 s away
        job.run("scontrol", "update", f"TimeLimit={limit}", "JobId")
        job.requeued_then_finishes()
        assert "stopped on request (SIGUSR1)" in job.said and "exit code 75, requeued" in job.said


def test_a_cancelled_job_ends_in_time_with_whole_videos_and_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    with LongJob(slurm, *QUICK, cwd=tmp_path) as job:
        start = time.monotonic()
        job.run("scancel")
        job.until(lambda: not job.run("squeue", "--noheader", "--job"))
        assert time.monotonic() - start < KILL_S
        assert job.about("ExitCode") == "75:0" and "stopped on request (SIGTERM)" in job.said
        assert job.state() == "CANCELLED" and job.about("Restarts") == "0" and "requeued" not in job.said
        assert job.finished() == job.before
        with h5py.File(job.out / "videos" / "a.h5") as video:
            assert video["frames"].shape[0] == 5 and video["frames"][:].any()

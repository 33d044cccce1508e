"""The program as users start it: good runs, bad input, ranks that die or stop, requests to stop."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcdit.config import demo_model
from hpcdit.render.checkpoints import unpack
from tests.system.program import ENV, Running, alive, command, finished, prompts, run, statuses
from tools import validate
from tools.bench.idle import read as read_idle

TOGETHER = ("parallel.replicas=1", "parallel.cfg=1")  # all ranks at one video: what is left to the planner varies
QUICK = (*TOGETHER, "sampling.steps=2", "sampling.num_frames=5", "sampling.max_sequence_length=16")
CAPTIONS = ("a red circle moving left on black", "a blue star growing on grey", "a green square moving up on white")


def test_one_process_renders_without_mpirun(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS[:2])
    ended = run(None, f"prompts={file}", "output.dir=out", "output.video=mp4", *QUICK, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(finished(tmp_path / "out")) == len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 2
    assert "MP4 files: libx264" in (tmp_path / "out" / "run.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt", "out"}, "nothing else is made"


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS[:2])
    line = ["python", "-m", "hpcdit", f"prompts={file}", "output.dir=out", *QUICK]
    with subprocess.Popen(line, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as program:
        assert program.stdout is not None
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(100) == 0
    assert len(finished(tmp_path / "out")) == 2


def test_a_run_leaves_videos_index_and_log_that_h5py_alone_reads(tmp_path: Path) -> None:
    rows = [
        {"id": "first", "prompt": CAPTIONS[0], "seed": 5},
        {"prompt": CAPTIONS[1], "negative_prompt": "mud", "num_frames": 9},
    ]
    file = prompts(tmp_path / "p.jsonl", [json.dumps(row) for row in rows])
    args = (f"prompts={file}", "output.dir=out", "cluster.ranks_per_node=1", "parallel.method=torus", *QUICK)
    ended = run(2, *args, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    with h5py.File(tmp_path / "out" / "job.h5") as job:
        assert [row["status"] for row in job["jobs"]] == [b"done", b"done"]
        video = job["videos"]["first"]
        assert video["frames"].shape == (5, 96, 96, 3) and video["frames"].attrs["fps"] == 16
        assert video.attrs["prompt"] == CAPTIONS[0] and video.attrs["seed"] == 5
        plan = json.loads(video.attrs["plan"])
        assert plan["method"] == "torus" and plan["step_s"] > 0 and plan["exposed_s"] > 0
        events = video["trace/events"][:]
        names, lanes = set(events["name"]), set(events["lane"])
        assert {b"encode", b"step", b"attend", b"push o", b"pull k", b"decode", b"write"} <= names
        assert {b"compute", b"inter", b"io"} <= lanes
        assert set(events["rank"]) == {0, 1} and (events["end"] >= events["start"]).all()
        assert events["end"].max() - events["start"].min() < 120, "one clock"
        assert names >= {b"pass", b"between steps"}
        second = next(name for name in job["videos"] if name != "first")
        every = np.concatenate([job["videos"][name]["trace/events"][:] for name in job["videos"]])
        assert job["videos"][second]["frames"].shape[0] == 9
    moved = every["bytes"][every["lane"] == b"inter"].sum() / 1e9
    log = (tmp_path / "out" / "run.log").read_text()
    assert moved > 0 and f"moved by attention: {moved:.3g} GB between nodes, 0 GB inside them" in log
    for idle in read_idle(tmp_path / "out").values():
        assert idle.steps == 4 and len(idle.between) == 2, "two videos of two steps"
        assert 0 < idle.attend_s < idle.busy_s < idle.window_s
    assert validate.main([str(tmp_path / "out")]) == 0
    log = (tmp_path / "out" / "run.log").read_text()
    peak = re.search(r"peak memory: ([\d.]+) GiB on the largest rank, ([\d.]+) GiB planned", log)
    assert peak and 0 < float(peak[2]) <= float(peak[1])
    assert "\x1b" not in log + ended.stderr and "\r" not in log + ended.stderr
    assert ended.stdout.count("2 videos done") == 1

    before = finished(tmp_path / "out")
    again = run(2, *args, "output.video=mp4", cwd=tmp_path)
    assert again.returncode == 0 and "2 were there" in again.stdout
    assert len(list((tmp_path / "out" / "videos").glob("*.mp4"))) == 2, "asked for later"
    assert finished(tmp_path / "out") == before
    half = run(2, *args, "model.dtype=bfloat16", cwd=tmp_path)
    assert half.returncode == 2 and "model.dtype=bfloat16" in half.stderr and "float32" in half.stderr
    other = run(2, *args, "sampling.steps=3", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "steps" in other.stderr and "3" in other.stderr and "2" in other.stderr and "first" in other.stderr
    assert finished(tmp_path / "out") == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["parallel.method=torus", "parallel.ulysses=3"], ["parallel.ulysses=3", "1x2, 2x1"]),
        (["parallel.ulysses=1", "parallel.ring=1", *TOGETHER], ["parallel.ring=1", "1x2, 2x1"]),
        (["parallel.replicas=3"], ["parallel.replicas=3", "divides 2"]),
        (["cluster.costs.memory_gb=0.01"], ["cluster.costs.memory_gb=0.01", "no layout fits", "allowed: "]),
        (["cluster=8x8"], ["cluster=8x8", "ethernet"]),
        (["cluster.nodes=5"], ["cluster.nodes=5", "1 node"]),
        (["sampling.height=97"], ["hpcdit: sampling.height: 97", "96 or 112"]),
        (
            ["sampling.scheduler=DDIMScheduler"],
            ["hpcdit: sampling.scheduler: DDIMScheduler", "UniPCMultistepScheduler"],
        ),
        (["model.path=."], ["model.path", "model_index.json"]),
        (["output.dir=file.txt"], ["output.dir=file.txt", "not a folder"]),
        (["output.dir=/proc/hpcdit"], ["output.dir=/proc/hpcdit", "cannot be written"]),
        (["prompts=file.txt", "sampling.num_frames=253", "sampling.width=512", "+x=1"], ["x: unknown key"]),
        (["transport.kind=nvshmem"], ["transport.kind=nvshmem", "auto or mpi"]),
        (["prompts=none.txt"], ["prompts", "none.txt"]),
    ],
)
def test_bad_input_is_one_line_for_all_ranks_with_code_2(args: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("a cat\n")
    ended = run(2, *args, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("hpcdit: "), ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
    assert ended.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {"file.txt"}, "no output folder is left"


def test_a_model_that_does_not_load_is_one_line_with_code_2(tmp_path: Path) -> None:
    folder = shutil.copytree(demo_model(), tmp_path / "model")
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors")
    ended = run(2, "model.path=model", "output.dir=out/here", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "text_encoder: its files lack the tensor" in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model"}, "no output folder is left"


@pytest.mark.parametrize("name, make", [("videos", Path.touch), ("run.log", Path.mkdir), ("job.h5", Path.mkdir)])
def test_an_output_folder_that_holds_other_things_is_refused(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    ended = run(None, "output.dir=out", cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert f"output.dir=out: cannot be written: out/{name}: " in ended.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


def test_a_full_disk_is_foreseen(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "a cat", "num_frames": 253, "height": 512, "width": 1024}) for _ in range(100_000)]
    file = prompts(tmp_path / "p.jsonl", lines)  # 40 TB
    ended = run(None, f"prompts={file}", "output.dir=out", cwd=tmp_path)
    assert ended.returncode == 2 and "are free on that disk" in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_video_that_is_not_a_picture_fails_and_the_others_are_made(tmp_path: Path) -> None:
    rows = [
        {"id": "broken", "prompt": CAPTIONS[0], "guidance_scale": 1e30},
        {"id": "well", "prompt": CAPTIONS[1]},
    ]
    file = prompts(tmp_path / "p.jsonl", [json.dumps(row) for row in rows])
    ended = run(2, f"prompts={file}", "output.dir=out", *QUICK, cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert list(finished(tmp_path / "out")) == ["well.h5"]
    found = statuses(tmp_path / "out")
    assert found["well"] == ("done", "") and found["broken"][0] == "failed" and "not numbers" in found["broken"][1]
    assert "broken: failed" in ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a small disk")
def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
    try:
        file = prompts(tmp_path / "p.txt", CAPTIONS)
        with Running(2, f"prompts={file}", "sampling.steps=20", *TOGETHER, cwd=tmp_path, out="disk/out") as program:
            program.until(r"00001\S+: starts")
            before = finished(program.out)
            with pytest.raises(OSError, match="No space left"), open(disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 16))
            code, _ = program.ended(60)
            assert code == 4, program.said
            assert "cannot be written: No space left on device" in program.said
            assert "Traceback" not in program.said
            assert before.items() <= finished(program.out).items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_killed_rank_ends_the_run_and_the_same_command_finishes_it(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS)
    args = (f"prompts={file}", "sampling.num_frames=17", "sampling.steps=25", "cluster.ranks_per_node=2", *TOGETHER)
    with Running(3, *args, cwd=tmp_path) as program:
        program.until(r"00000\S+: done")
        program.until(r"00002\S+: starts")
        before = finished(program.out)
        os.kill(program.pids()[1], signal.SIGKILL)
        code, seconds = program.ended(70)
        assert code == 4 and seconds < 65, program.said
        assert "rank 1" in program.said and "SIGKILL" in program.said
        assert not any(alive(pid) for pid in program.pids().values())
        assert before and before.items() <= finished(program.out).items()
    again = run(3, "output.dir=out", *args, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = finished(tmp_path / "out")
    assert len(after) == 3 and before.items() <= after.items()
    unbroken = run(3, "output.dir=whole", *args, cwd=tmp_path)
    assert unbroken.returncode == 0
    for name in after:
        with h5py.File(tmp_path / "out/videos" / name) as a, h5py.File(tmp_path / "whole/videos" / name) as b:
            assert np.abs(a["frames"][:].astype(int) - b["frames"][:]).max() <= 1


# Of two replicas none waits for the other before the end.
@pytest.mark.parametrize("layout", ["cluster.ranks_per_node=1", "cluster.ranks_per_node=2", "parallel.replicas=2"])
def test_a_stopped_rank_is_noticed_and_named(layout: str, tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS)
    timeout_s = 4
    args = (f"prompts={file}", "sampling.steps=200", f"transport.timeout_s={timeout_s}", "parallel.cfg=1")
    together = ["parallel.replicas=1"] * ("replicas" not in layout)
    with Running(2, *args, layout, *together, cwd=tmp_path) as program:
        program.until(r"step \d+/200")
        os.kill(program.pids()[1], signal.SIGSTOP)
        code, seconds = program.ended(60)
        assert code == 4 and seconds < timeout_s + 5, program.said
        assert "no sign of life from rank 1" in program.said and "while waiting for" in program.said
        assert not any(alive(pid) for pid in program.pids().values())


@pytest.mark.parametrize("grace_s", [0, 200])
def test_a_request_to_stop_ends_the_run_with_75_and_it_can_be_resumed(grace_s: int, tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS)
    args = (f"prompts={file}", "sampling.num_frames=17", "sampling.steps=25", *TOGETHER)
    with Running(2, *args, f"grace_s={grace_s}", "checkpoint.seconds=0", cwd=tmp_path) as program:
        while not any((tmp_path / "out").glob("checkpoints/00001*")):  # it is in its steps
            assert program.process.poll() is None, program.said
            time.sleep(0.02)
        os.kill(program.pids()[1], signal.SIGTERM)
        code, _ = program.ended(60)
        assert code == 75, program.said
        assert "stopped on request" in program.said
        before = finished(program.out)
    assert len(before) == (1 if grace_s == 0 else 2), "what was denoised is written"
    left = [path.name for path in (tmp_path / "out").glob("checkpoints/*")]
    assert [name[:5] for name in left] == (["00001"] if grace_s == 0 else [])
    again = run(2, "output.dir=out", *args, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len(re.findall(r"00001\S+: goes on after step", program.log)) == len(left)
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert len(finished(tmp_path / "out")) == 3 and before.items() <= finished(tmp_path / "out").items()


def test_a_request_to_stop_is_met_while_the_libraries_are_imported(tmp_path: Path) -> None:
    """A torch that takes a minute to import, as from a file system that is slow."""
    slow = tmp_path / "slow"
    (slow / "torch").mkdir(parents=True)
    (slow / "torch" / "__init__.py").write_text(
        "import os, time\nopen(f'importing-{os.getpid()}', 'w').close()\ntime.sleep(60)\nraise SystemExit(1)\n"
    )
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(slow), ENV.get("PYTHONPATH", "")])}
    line = command(2, "output.dir=out")
    with subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as program:
        deadline = time.monotonic() + 60
        while len(importing := list(tmp_path.glob("importing-*"))) < 2:
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        start = time.monotonic()
        program.send_signal(signal.SIGTERM)
        _, said = program.communicate(timeout=90)
    assert program.returncode == 75 and time.monotonic() - start < 20, said
    assert said.count("stopped on request (SIGTERM); the same command resumes") == 1
    assert not any(alive(int(path.name.partition("-")[2])) for path in importing)
    assert not (tmp_path / "out").exists()


def one_video(folder: Path, steps: int) -> tuple[str, ...]:
    file = prompts(folder / "p.txt", CAPTIONS[:1])
    layout = ("parallel.method=ring", "parallel.groups=1", *TOGETHER)  # what is measured decides nothing
    return f"prompts={file}", f"sampling.steps={steps}", "checkpoint.seconds=0", *layout


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of one video in 20 steps that nobody has killed."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = run(2, "output.dir=out", *one_video(folder, 20), cwd=folder)
    assert ended.returncode == 0 and not (folder / "out" / "checkpoints").exists(), ended.stderr
    return folder / "out"


@pytest.mark.parametrize("killed_after", [8, 20], ids=["in a step", "in decode"])
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_frames(
    killed_after: int, unbroken: Path, tmp_path: Path
) -> None:
    steps = 20
    args = one_video(tmp_path, steps)
    with Running(2, *args, cwd=tmp_path) as program:
        program.until("starts")
        while (at := step_of(program.out / "checkpoints")) < killed_after:
            assert program.process.poll() is None, f"over, with a checkpoint of step {at}: {program.said}"
            time.sleep(0.01)
        os.kill(program.pids()[1], signal.SIGKILL)
        assert program.ended(70)[0] == 4, program.said
        assert not finished(program.out)
    again = run(2, "output.dir=out", *args, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    (before,) = re.findall(r"goes on after step (\d+)", program.log)
    assert killed_after <= int(before) <= steps and not (tmp_path / "out" / "checkpoints").exists()
    (name,) = finished(tmp_path / "out")
    with h5py.File(tmp_path / "out/videos" / name) as a, h5py.File(unbroken / "videos" / name) as b:
        assert (a["frames"][:] == b["frames"][:]).all()
        assert json.loads(a.attrs["plan"])["first_step"] == int(before)


def step_of(folder: Path) -> int:
    """The step of the one checkpoint in `folder`; 0 without one."""
    found = list(folder.glob("[!.]*"))
    return unpack(found[0].read_bytes())[0].step if found else 0


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    file = prompts(tmp_path / "p.txt", CAPTIONS)
    with Running(1, f"prompts={file}", "sampling.steps=200", cwd=tmp_path) as program:
        program.until("starts")
        second = run(1, f"prompts={file}", "output.dir=out", "sampling.steps=200", cwd=tmp_path)
        assert second.returncode == 2 and "another run is writing there" in second.stderr

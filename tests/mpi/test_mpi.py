"""Runs the cases of this folder under mpirun, many in one start, and looks at what they found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.mpi import cases


def mpirun(ranks: int, case: str, *args: str, timeout_s: float = 400) -> Any:
    """What a case of cases.py returns on rank 0."""
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable]
    command += ["-m", "tests.mpi.under_mpi", "tests.mpi.cases", case, *args]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    (result,) = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(result.removeprefix("RESULT "))


def test_every_method_is_exact_on_one_to_six_ranks_over_both_ways_between_nodes() -> None:
    found = mpirun(6, "transports")
    assert sorted(found) == list("123456")
    for size, (worst, count) in found.items():
        assert worst < 1e-12, f"{size} ranks"
        assert count >= 15, f"{size} ranks"


def test_an_exception_in_a_thread_of_one_rank_ends_all_ranks_with_its_message() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 on .*ZeroDivisionError"):
        mpirun(3, "broken_thread", timeout_s=60)


def test_a_rank_without_heartbeat_is_named_by_the_one_that_waits() -> None:
    said, seconds = mpirun(3, "silent_rank", timeout_s=60)
    assert said.startswith("no sign of life from rank 2") and "waiting for a piece" in said
    assert 1.5 < seconds < 10


def test_the_demo_is_the_same_video_on_one_to_six_ranks(tmp_path: Path) -> None:
    """The whole program, with the packaged model and the shipped settings, on each number of ranks."""
    prompts = tmp_path / "one.txt"
    prompts.write_text("a blue triangle moving right on black\n")
    assert mpirun(6, "program", str(prompts), str(tmp_path)) == {str(size): 0 for size in range(1, 7)}
    frames = {}
    for size in range(1, 7):
        (path,) = (tmp_path / str(size) / "videos").glob("*.h5")
        with h5py.File(path) as file:
            frames[size] = file["frames"][:].astype(int)
    assert frames[1].shape == (33, 96, 96, 3) and frames[1].std() > 20
    for size in range(2, 7):
        assert abs(frames[size] - frames[1]).max() <= 1, f"{size} ranks"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random checkpoint with 5 heads, and the frames that diffusers' own pipeline makes of it on one process."""
    import torch
    from diffusers import WanPipeline

    from tests.checkpoints import make_wan

    folder = tmp_path_factory.mktemp("wan")
    make_wan(folder / "model")
    pipe = WanPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    frames = {}
    for name, scale in (("guided", 4.0), ("unguided", 1.0)):
        video = pipe(
            cases.PROMPT,
            cases.NEGATIVE,
            num_frames=cases.SIZE[0],
            height=cases.SIZE[1],
            width=cases.SIZE[2],
            num_inference_steps=cases.STEPS,
            guidance_scale=scale,
            max_sequence_length=cases.LENGTH,
            generator=torch.Generator().manual_seed(cases.SEED),
            output_type="np",
        ).frames[0]
        frames[name] = (video * 255).round().astype(int)
    np.savez(folder / "frames.npz", **frames)
    return folder / "model", folder / "frames.npz"


def test_frames_equal_diffusers_on_one_to_six_ranks_by_every_method(tiny: tuple[Path, Path]) -> None:
    found = mpirun(6, "wan_frames", *map(str, tiny))
    assert sorted(found) == list("123456")
    for size, (count, worst) in found.items():
        assert worst <= 1, f"{size} ranks: {worst} levels"
        assert count >= 5, f"{size} ranks"

"""A render on GPUs gives the frames that one CPU gives, however it is cut up."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.require import needs
from tests.system.program import Start, run

SMALL = ("sampling.steps=4", "sampling.num_frames=9", "sampling.height=64", "sampling.width=64", "trace.level=0")
PLAIN = ("model.compile=false",)  # compiling takes longer than all the rest


FOUND = torch.cuda.device_count()
one_gpu = needs("gpu", "" if FOUND else "needs a GPU")
two_gpus = needs("gpus", "" if FOUND > 1 else f"needs 2 GPUs, there are {FOUND}")


def frames(start: Start, folder: Path, name: str, *args: str) -> list[np.ndarray]:
    """The frames of each of two videos, as int16."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moving right\na blue square moving up\n")
    done = run(start, f"output.dir={name}", f"prompts={prompts}", *SMALL, *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    paths = sorted((folder / name / "videos").glob("*.h5"))
    assert len(paths) == 2
    return [h5py.File(path)["frames"][:].astype(np.int16) for path in paths]


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], levels: int) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        off = np.abs(ours - theirs)
        assert (off <= levels).all(), f"{(off > levels).mean():.2%} differ by more, at worst {off.max()}"


def distance(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Levels by which the values of all videos differ, on average."""
    return float(np.mean([np.abs(ours - theirs).mean() for ours, theirs in zip(found, wanted, strict=True)]))


@one_gpu
@pytest.mark.parametrize("how", [(), (*PLAIN, "model.graph=false"), PLAIN])
def test_one_gpu_gives_the_frames_of_the_cpu(tmp_path: Path, how: tuple[str, ...]) -> None:
    wanted = frames(None, tmp_path, "cpu", "model.device=cpu")
    assert_near(frames(None, tmp_path, "gpu", "model.device=cuda", *how), wanted, levels=1)
    assert "device: NVIDIA" in (tmp_path / "gpu" / "run.log").read_text()


@one_gpu
def test_text_encoders_that_stay_on_the_host_encode_the_same(tmp_path: Path) -> None:
    wanted = frames(None, tmp_path, "usual", "model.device=cuda", *PLAIN)
    least = leanest(tmp_path, "model.device=cuda")
    assert_near(frames(None, tmp_path, "lean", "model.device=cuda", *PLAIN, f"{MEMORY}={least}"), wanted, levels=1)
    assert "text encoders stay on the host" in (tmp_path / "lean" / "run.log").read_text()
    assert "text encoders stay" not in (tmp_path / "usual" / "run.log").read_text()


MEMORY = "cluster.costs.memory_gb"


def leanest(folder: Path, *args: str) -> float:
    """Gigabytes that a rank has to have at least, as a run that finds less says."""
    refused = run(
        None, "output.dir=refused", f"prompts={folder / 'prompts.txt'}", *SMALL, *args, f"{MEMORY}=0.001", cwd=folder
    )
    said = re.search(r"the leanest takes ([\d.]+) GB", refused.stderr)
    assert refused.returncode == 2 and said, refused.stderr
    return float(said[1]) * 1.001


TWO = ("model.device=cuda", *PLAIN)
PLACES = (("near", ()), ("far", ("cluster.ranks_per_node=1",)))


def together(layout: str) -> tuple[str, ...]:
    return ("parallel.replicas=1", "parallel.cfg=1", f"parallel.method={layout}")


@two_gpus
@pytest.mark.parametrize("layout", ["torus", "ring", "ulysses"])
def test_two_gpus_give_the_frames_of_one(layout: str, tmp_path: Path) -> None:
    one = frames(None, tmp_path, "one", *TWO)
    for name, more in PLACES:
        two = frames(2, tmp_path, name, *TWO, *together(layout), *more)
        assert "nvshmem" in (tmp_path / name / "run.log").read_text()
        assert_near(two, one, levels=1)


@two_gpus
@pytest.mark.parametrize("layout", ["torus", "ring", "ulysses"])
def test_in_bfloat16_two_gpus_are_as_near_to_one_as_bfloat16_is_to_float32(layout: str, tmp_path: Path) -> None:
    """What rounding alone does to a video, its model decides: the demo's may move an edge by pixels."""
    exact, one = (frames(None, tmp_path, dtype, *TWO, f"model.dtype={dtype}") for dtype in ("float32", "bfloat16"))
    rounding = distance(one, exact)
    for name, more in PLACES:
        two = frames(2, tmp_path, name, *TWO, "model.dtype=bfloat16", *together(layout), *more)
        print(f"{layout}, {name}: {distance(two, one):.3f} levels on average; bfloat16 against float32 {rounding:.3f}")
        assert distance(two, one) <= 2 * rounding


@two_gpus
@pytest.mark.parametrize("kind", ["nvshmem", "mpi"])
def test_halves_of_guidance_give_the_frames_of_one_gpu(kind: str, tmp_path: Path) -> None:
    one = frames(None, tmp_path, "one", "model.device=cuda", *PLAIN)
    halves = ("parallel.replicas=1", "parallel.cfg=2", f"transport.kind={kind}", *PLAIN)
    assert_near(frames(2, tmp_path, "two", "model.device=cuda", *halves), one, levels=1)


@two_gpus
def test_gpus_without_nvshmem_go_through_the_host(tmp_path: Path) -> None:
    wanted = frames(None, tmp_path, "one", *TWO)
    assert_near(frames(2, tmp_path, "two", *TWO, *together("torus"), "transport.kind=mpi"), wanted, levels=1)

"""A render on GPUs gives the frames that one CPU gives, however it is cut up."""

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


def assert_near(found: list[np.ndarray], wanted: list[np.ndarray], levels: int, share: float = 1.0) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        off = np.abs(ours - theirs)
        assert (off <= levels).mean() >= share, f"{(off > levels).mean():.2%} differ by more, at worst {off.max()}"


@one_gpu
@pytest.mark.parametrize("how", [(), (*PLAIN, "model.graph=false"), PLAIN])
def test_one_gpu_gives_the_frames_of_the_cpu(tmp_path: Path, how: tuple[str, ...]) -> None:
    wanted = frames(None, tmp_path, "cpu", "model.device=cpu")
    assert_near(frames(None, tmp_path, "gpu", "model.device=cuda", *how), wanted, levels=1)
    assert "device: NVIDIA" in (tmp_path / "gpu" / "run.log").read_text()


@two_gpus
@pytest.mark.parametrize(("dtype", "levels", "share"), [("float32", 1, 1.0), ("bfloat16", 2, 0.999)])
@pytest.mark.parametrize("layout", ["torus", "ring", "ulysses"])
def test_two_gpus_give_the_frames_of_one(layout: str, dtype: str, levels: int, share: float, tmp_path: Path) -> None:
    common = (f"model.dtype={dtype}", "model.device=cuda", *PLAIN)
    together = ("parallel.replicas=1", "parallel.cfg=1", f"parallel.method={layout}")
    one = frames(None, tmp_path, "one", *common)
    for name, more in (("near", ()), ("far", ("cluster.ranks_per_node=1",))):
        two = frames(2, tmp_path, name, *common, *together, *more)
        assert "nvshmem" in (tmp_path / name / "run.log").read_text()
        assert_near(two, one, levels, share)


@two_gpus
def test_gpus_without_nvshmem_go_through_the_host(tmp_path: Path) -> None:
    together = ("parallel.replicas=1", "parallel.cfg=1", "transport.kind=mpi", *PLAIN)
    wanted = frames(None, tmp_path, "one", "model.device=cuda", *PLAIN)
    assert_near(frames(2, tmp_path, "two", "model.device=cuda", *together), wanted, levels=1)

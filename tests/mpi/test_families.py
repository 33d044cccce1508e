"""Every model family renders what diffusers' own pipeline renders on one process, on any number of ranks."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.families import EXAMPLES, PROMPTS
from tests.mpi.families import LAYOUTS
from tests.mpi.test_mpi import mpirun


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family a checkpoint, and the levels of its videos."""
    folder = tmp_path_factory.mktemp("families")
    for name, example in EXAMPLES.items():
        example.make(folder / name)
        both = np.stack([example.reference(folder / name, *prompt) for prompt in PROMPTS])
        assert both.std() > 5 and abs(both[0].astype(int) - both[1]).max() > 5, f"{name}: nothing to compare"
        np.save(folder / f"{name}.npy", both)
    return folder


def test_frames_equal_diffusers_on_one_to_three_ranks_in_batches(checkpoints: Path) -> None:
    found = mpirun(3, "frames", str(checkpoints), module="tests.mpi.families")
    assert set(found) == set(EXAMPLES)
    for name, sizes in found.items():
        assert sorted(sizes) == list("123"), name
        for size, (count, worst) in sizes.items():
            assert count == len(LAYOUTS[int(size)])
            assert worst <= 1, f"{name} on {size} ranks: {worst} levels"


def test_the_program_renders_them_each_half_of_guidance_on_a_rank(checkpoints: Path) -> None:
    assert mpirun(2, "program", str(checkpoints), module="tests.mpi.families") == dict.fromkeys(EXAMPLES, 0)
    for name, example in EXAMPLES.items():
        expected = np.load(checkpoints / f"{name}.npy").astype(int)
        for (_, _, seed), levels in zip(PROMPTS, expected, strict=True):
            with h5py.File(checkpoints / f"{name}-out" / "videos" / f"{seed}.h5") as file:
                assert abs(file["frames"][:].astype(int) - levels).max() <= 1, f"{name}, {seed}"
                swapped = b"exchange cfg" in set(file["trace/events"]["name"])
            assert swapped == example.guided, name

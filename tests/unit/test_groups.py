"""How ranks are cut into groups, and jobs into batches."""

from dataclasses import replace

import pytest

from hpcdit.config import Sampling, load
from hpcdit.errors import InputError
from hpcdit.render.groups import axes, mesh, sequences
from hpcdit.render.manifest import Job
from hpcdit.render.queue import batches

SAMPLING = Sampling(9, 48, 80, 3, 4.0, 0, 16, 24)


def jobs(*samplings: Sampling) -> list[Job]:
    return [Job(n, str(n), f"prompt {n}", "", replace(s, seed=n)) for n, s in enumerate(samplings)]


def test_a_batch_is_of_neighbours_that_differ_in_text_and_seed_alone() -> None:
    same = jobs(*[SAMPLING] * 5)
    assert batches(same, 1) == [[0], [1], [2], [3], [4]]
    assert batches(same, 2) == [[0, 1], [2, 3], [4]]
    assert batches(same, 9) == [[0, 1, 2, 3, 4]]
    assert batches([], 3) == []
    assert batches(jobs(SAMPLING, replace(SAMPLING, fps=8)), 2) == [[0, 1]], "fps is the file's alone"


@pytest.mark.parametrize("key", ["num_frames", "height", "width", "steps", "guidance_scale", "max_sequence_length"])
def test_whatever_the_denoising_depends_on_parts_batches(key: str) -> None:
    other = replace(SAMPLING, **{key: 1})
    assert batches(jobs(SAMPLING, other, other, SAMPLING), 4) == [[0], [1, 2], [3]]


def axes_of(*args: str, ranks: int) -> tuple[int, int]:
    config = load(args)
    assert config is not None
    return axes(config, ranks)


def test_axes_are_those_that_are_asked_for() -> None:
    assert axes_of("parallel.replicas=3", "parallel.cfg=2", ranks=12) == (3, 2)
    assert axes_of("parallel.replicas=4", "parallel.cfg=1", ranks=4) == (4, 1)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["parallel.replicas=3"], "parallel.replicas=3: 4 ranks"),
        (["parallel.replicas=4", "parallel.cfg=2"], "parallel.replicas=4 parallel.cfg=2: 4 ranks"),
    ],
)
def test_ranks_that_cannot_be_cut_evenly_are_refused_naming_the_keys(args: list[str], named: str) -> None:
    with pytest.raises(InputError) as caught:
        axes_of(*args, ranks=4)
    assert str(caught.value).startswith(named) and "divides 4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_nodes_go_to_replicas_first_and_then_to_halves() -> None:
    nodes = [rank // 4 for rank in range(16)]
    grid = mesh(16, 2, 2)
    assert [grid.coords(rank)["replicas"] for rank in range(16)] == [0] * 8 + [1] * 8
    assert [grid.coords(rank)["cfg"] for rank in range(8)] == [0] * 4 + [1] * 4
    assert sequences(nodes, 2, 2) == {(0, 0, 0, 0)}
    assert sequences(nodes, 2, 1) == {(0, 0, 0, 0, 1, 1, 1, 1)}
    assert sequences([0, 0, 0, 1, 1, 1], 3, 1) == {(0, 0), (0, 1)}

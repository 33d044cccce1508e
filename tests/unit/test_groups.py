"""How ranks are cut into groups, and jobs into batches."""

from dataclasses import replace
from typing import Any

import pytest

from hpcdit.config import Sampling
from hpcdit.render.groups import mesh
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


@pytest.mark.parametrize("key", sorted(vars(SAMPLING).keys() - {"seed", "fps"}))
def test_whatever_the_denoising_depends_on_parts_batches(key: str) -> None:
    changed: dict[str, Any] = {key: "Other" if key == "scheduler" else 1}
    other = replace(SAMPLING, **changed)
    assert batches(jobs(SAMPLING, other, other, SAMPLING), 4) == [[0], [1, 2], [3]]


def test_whole_nodes_go_to_replicas_first_and_then_to_halves() -> None:
    grid = mesh(16, 2, 2)
    assert [grid.coords(rank)["replicas"] for rank in range(16)] == [0] * 8 + [1] * 8
    assert [grid.coords(rank)["cfg"] for rank in range(8)] == [0] * 4 + [1] * 4

"""Worlds that cannot be what was launched are refused with the fix."""

import pytest

from hpcdit.cluster import launch_error


@pytest.mark.parametrize(
    "env, size",
    [
        ({}, 1),
        ({"PMI_SIZE": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "3", "SLURM_NTASKS": "3"}, 3),
        ({"PMI_SIZE": "2", "SLURM_NTASKS": "8"}, 2),  # mpirun -n 2 inside a larger allocation
        ({"PMI_SIZE": "1", "SLURM_NTASKS": "8"}, 1),
        ({"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_NTASKS": "many"}, 1),
    ],
)
def test_a_world_that_the_launcher_knows_is_accepted(env: dict[str, str], size: int) -> None:
    assert launch_error(env, size) is None


@pytest.mark.parametrize("key", ["SLURM_NTASKS", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_n_worlds_of_one_rank_are_refused_with_the_fix(key: str) -> None:
    why = launch_error({key: "4"}, 1)
    assert why is not None and f"{key}=4" in why and "MPI sees 1 rank:" in why
    assert "srun --mpi=pmi2" in why and f"unset {key}" in why and "\n" not in why


def test_a_world_of_another_size_than_the_launchers_is_refused() -> None:
    assert launch_error({"PMI_SIZE": "4"}, 2) is not None

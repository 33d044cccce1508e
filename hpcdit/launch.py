"""What a launcher tells of the run that it starts."""

from collections.abc import Mapping


def launch_error(env: Mapping[str, str], size: int) -> str | None:
    """Why a world of `size` ranks cannot be what was launched, or None: n worlds of one rank overwrite each other."""
    sizes = {key: env[key] for key in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE") if env.get(key, "").isdigit()}
    if not sizes and env.get("SLURM_NTASKS", "").isdigit():  # of the allocation, where mpirun has set its own beside it
        sizes = {"SLURM_NTASKS": env["SLURM_NTASKS"]}
    wrong = {key: n for key, n in sizes.items() if int(n) != size}
    if not wrong:
        return None
    key, n = next(iter(wrong.items()))
    return (
        f"{key}={n}, but MPI sees {size} rank{'s' * (size > 1)}: the launcher and the MPI library do not know each"
        " other. Under Slurm start with `srun --mpi=pmi2` or `--mpi=pmix` (`srun --mpi=list` names what there is), else"
        " with the mpirun of the MPI that mpi4py uses (`python -m mpi4py --mpi-library`);"
        f" for a run on one rank, unset {key}"
    )

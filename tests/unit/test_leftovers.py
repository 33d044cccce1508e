"""Shared memory of dead ranks is removed, and nobody else's."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcdit.leftovers import OLD_S, first_here, remove_segments

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def segment(path: Path, age_s: float = 2 * OLD_S) -> Path:
    path.write_bytes(bytes(4096))
    os.utime(path, times=(time.time() - age_s,) * 2)
    return path


def test_only_old_segments_of_mpi_that_nobody_holds_are_removed(tmp_path: Path) -> None:
    dead = segment(tmp_path / "mpich_shm_1_0")
    young = segment(tmp_path / "mpich_shm_2_0", age_s=OLD_S / 2)
    others = segment(tmp_path / "psm_3")
    opened, mapped = segment(tmp_path / "mpich_shm_4_0"), segment(tmp_path / "vader_segment.5")
    (tmp_path / "mpich_shm_6").symlink_to(others)
    hold = f"""if True:
        import mmap, sys
        keep = open({str(opened)!r}, "r+b")
        with open({str(mapped)!r}, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 4096)
        print("held", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert remove_segments(tmp_path) == [dead]
        assert not dead.exists() and all(path.exists() for path in (young, others, opened, mapped))
        holder.communicate("")
    assert sorted(remove_segments(tmp_path)) == [opened, mapped]
    assert remove_segments(tmp_path / "none") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_another_user_s_segment_stays(tmp_path: Path) -> None:
    theirs = segment(tmp_path / "mpich_shm_1_0")
    os.chown(theirs, 12345, 12345)
    assert remove_segments(tmp_path) == [] and theirs.exists()


def test_one_rank_a_host_looks() -> None:
    assert first_here({}) and first_here({"MPI_LOCALRANKID": "0", "SLURM_LOCALID": "1"})
    assert not first_here({"MPI_LOCALRANKID": "1"}) and not first_here({"SLURM_LOCALID": "3"})

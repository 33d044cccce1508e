"""Shared memory that killed ranks have left in /dev/shm, where it takes the node's memory until somebody removes it.

MPICH names the segment through which the ranks of a host find each other, and removes the name when they end; a rank
that is killed cannot. What a new run removes is its own user's, has been there for longer than the start of MPI may
take, and is open in none of this user's processes. (Those of another process namespace are not seen: they have their
ranks attached by then, and lose the name alone.)
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

SHM = Path("/dev/shm")
NAMES = "mpich_sh", "ucx_shm_posix_", "vader_segment."  # MPICH's, UCX's and Open MPI's
OLD_S = 900.0  # longer than the start of MPI is waited for
LOCAL_RANKS = "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"


def first_here(env: Mapping[str, str]) -> bool:
    """Whether this is the first rank of its host, as the launcher tells it."""
    return next((env[name] for name in LOCAL_RANKS if name in env), "0") == "0"


def remove_segments(folder: Path = SHM, old_s: float = OLD_S) -> list[Path]:
    """Removes the segments of MPI in `folder` that no process holds any more; returns them. Raises nothing."""
    found: dict[tuple[int, int], Path] = {}
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(NAMES) and (key := _left(entry, old_s)):
                found[key] = Path(entry.path)
    if not found:
        return []
    held = {key for process in _own_processes() for key in _held(process)}
    removed = [path for key, path in found.items() if key not in held]
    for path in removed:
        with suppress(OSError):
            path.unlink()
    return removed


def _left(entry: os.DirEntry[str], old_s: float) -> tuple[int, int] | None:
    """(device, inode) of a file of this user that is `old_s` seconds old; None of any other."""
    with suppress(OSError):
        about = entry.stat(follow_symlinks=False)
        old = time.time() - about.st_mtime > old_s
        if entry.is_file(follow_symlinks=False) and about.st_uid == os.geteuid() and old:
            return about.st_dev, about.st_ino
    return None


def _own_processes() -> Iterator[Path]:
    for name in os.listdir("/proc"):
        process = Path("/proc", name)
        with suppress(FileNotFoundError, ProcessLookupError):
            if name.isdigit() and process.stat().st_uid == os.geteuid():
                yield process


def _held(process: Path) -> Iterator[tuple[int, int]]:
    """(device, inode) of the files that a process has open or in its memory."""
    # It may have ended meanwhile; one that hides its memory from its own user (a daemon of the login) is no rank.
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in (process / "maps").read_text(errors="replace").splitlines():
            device, inode = line.split()[3:5]
            major, minor = (int(part, 16) for part in device.split(":"))
            yield os.makedev(major, minor), int(inode)
        for number in os.listdir(process / "fd"):
            with suppress(FileNotFoundError):
                about = os.stat(process / "fd" / number)
                yield about.st_dev, about.st_ino

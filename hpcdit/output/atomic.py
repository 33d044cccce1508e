"""Files that are whole or absent: written under a hidden name in the same folder, synced, then named."""

import errno
import fcntl
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

_PREFIX, _SUFFIX = ".hpcdit-", ".part"


def write(path: Path, data: bytes | memoryview, replace: bool = False) -> None:
    """Writes `data` to `path`; whatever happens, the file under that name is whole or is not there.

    With `replace` an older file gives way in one step. Without it, an existing one raises FileExistsError and
    stays. Any other error (OSError: a full disk, say) leaves no trace of the attempt.
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    try:
        temporary, descriptor = _reserve(path.parent)
    except OSError as error:
        error.filename = str(path)  # what people know
        raise
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
        os.close(descriptor)
    _sync_folder(path.parent)


def clean(folder: Path, stale_after: float = 3600.0) -> list[Path]:
    """Removes what dead processes left half-written in `folder`, never what a live one is writing; says what.

    A writer holds a lock on its file for as long as it lives. Whoever gets the lock knows that the writer is
    dead, if both are on one host. Between hosts some file systems do not pass locks on, and some have none:
    there the file must also be untouched for `stale_after` seconds (it is written in one go, in far less).
    """
    removed = []
    for path in sorted(Path(folder).glob(f"{_PREFIX}*{_SUFFIX}")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or somebody else's
            continue
        try:
            locked = _lock(descriptor)
            ours = locked and path.name.startswith(f"{_PREFIX}{_host()}-")
            old = time.time() - os.fstat(descriptor).st_mtime > stale_after
            if ours or (locked is not False and old):
                os.unlink(path)
                removed.append(path)
        finally:
            os.close(descriptor)
    return removed


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]


def _reserve(folder: Path) -> tuple[Path, int]:
    """A new hidden file in `folder`, locked by this process, and its descriptor.

    The name does not hold the final one: that may be as long as a file name can be.
    """
    while True:
        temporary = folder / f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process's `clean` came between creation and lock, and removes it


def _lock(descriptor: int) -> bool | None:
    """True: the lock is ours; False: a live process has it; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _link(temporary: Path, path: Path) -> None:
    """Gives the file its name; unlike a rename, a hard link fails where the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS may carry the request out twice, and report the second failure of a success.
        if not os.path.samefile(temporary, path):
            raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # No hard links on this file system (FAT, some network ones): what remains is to look first.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: this file system does not sync folders
            raise
    finally:
        os.close(descriptor)

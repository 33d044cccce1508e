"""Files are whole or absent, also when the process is killed or the disk is full."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdit.output import atomic

OLD, NEW = b"old" * 1000, b"new" * 1000
ROOT = Path(__file__).resolve().parents[2]

# Forks once for each moment: the child writes and is killed right before or right after its n-th call of a function.
KILLED = """
import os, signal, sys
from pathlib import Path
from hpcdit.output import atomic

def arm(name, number, late):
    real, calls = getattr(os, name), 0
    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls != number: return real(*args, **options)
        try:
            if late: real(*args, **options)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, name, call)

def half(descriptor, data, real=os.write):
    real(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

replace = sys.argv[2] == "replace"
name = "replace" if replace else "link"
moments = [(f, n, late) for f, n in [("open", 1), ("write", 1), ("fsync", 1), (name, 1), ("unlink", 1), ("fsync", 2)]
           for late in (False, True)]
for i, moment in enumerate([None, *moments]):
    if os.fork() == 0:
        if moment: arm(*moment)
        else: os.write = half
        atomic.write(Path(sys.argv[1]) / str(i) / "file", b"new" * 1000, replace)
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
print(len(moments) + 1)
"""

# Writes 10 MB again and again under new names until it is killed.
BUSY = """
import sys
from pathlib import Path
from hpcdit.output import atomic
print("ready", flush=True)
for i in range(1000):
    atomic.write(Path(sys.argv[1]) / f"file{i}", bytes(10_000_000))
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module", params=["replace", "new"])
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, list[Path]]:
    """Folders in each of which a writer was killed at another moment; where it was to replace, OLD was there."""
    folder, replace = tmp_path_factory.mktemp("killed"), request.param == "replace"
    for i in range(13):
        (folder / str(i)).mkdir()
        if replace:
            (folder / str(i) / "file").write_bytes(OLD)
    child = python(KILLED, str(folder), request.param)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out.strip()) == (0, "13"), err
    return replace, sorted(folder.iterdir())


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_file_or_none(killed: tuple[bool, list[Path]]) -> None:
    replace, folders = killed
    found = [(folder / "file").read_bytes() if (folder / "file").exists() else None for folder in folders]
    assert set(found) == {OLD if replace else None, NEW}, "some are early enough and some late enough"


def test_what_a_killed_writer_leaves_behind_is_cleaned_up(killed: tuple[bool, list[Path]]) -> None:
    _, folders = killed
    assert sum(len(atomic.clean(folder)) for folder in folders) > 3
    assert {path.name for folder in folders for path in folder.iterdir()} == {"file"}


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.019, 0.031])
def test_a_writer_that_is_killed_while_busy_leaves_whole_files(delay: float, tmp_path: Path) -> None:
    child = python(BUSY, str(tmp_path))
    assert child.stdout and child.stdout.readline() == "ready\n"
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert {path.stat().st_size for path in tmp_path.glob("file*")} <= {10_000_000}
    atomic.clean(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_an_error_names_the_file_that_people_know(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/x'"):
        atomic.write(tmp_path / "none" / "x", b"")


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with pytest.raises(FileExistsError, match="file"):
        atomic.write(path, NEW)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync = tmp_path / "file", os.fsync

    def appear(descriptor: int) -> None:
        path.write_bytes(OLD)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", appear)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        atomic.write(path, NEW)
    assert path.read_bytes() == OLD and os.listdir(tmp_path) == ["file"]


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    atomic.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW and os.listdir(tmp_path) == ["file"]


def test_a_link_that_the_server_made_and_then_denied_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    atomic.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(
    call: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(os, call, fail)
        atomic.write(tmp_path / "file", NEW)
    assert os.listdir(tmp_path) == []


def test_writes_that_come_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    atomic.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW


def test_file_and_folder_are_synced_before_and_after_the_naming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, link = os.fsync, os.link

    def synced(descriptor: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def linked(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    atomic.write(tmp_path / "file", NEW)
    assert [call.startswith(".hpcdit-") or call for call in calls] == [True, "link", tmp_path.name]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 252 + ".h5")
    atomic.write(path, NEW)
    assert path.read_bytes() == NEW


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A folder where a process that lives, but has been stopped, is in the middle of writing."""
    code = "import os, signal, sys; from pathlib import Path; from hpcdit.output import atomic\n"
    code += "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGSTOP)\natomic.write(Path(sys.argv[1]) / 'file', b'x')"
    child = python(code, str(tmp_path))
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    yield tmp_path
    child.send_signal(signal.SIGCONT)
    time.sleep(0.05)
    child.kill()
    child.communicate()


def test_cleaning_never_touches_what_a_live_process_writes(live: Path) -> None:
    (temporary,) = live.glob(".hpcdit-*")
    os.utime(temporary, (0, 0))
    assert atomic.clean(live) == [] and temporary.exists()


@pytest.mark.parametrize(("age", "removed"), [(60, False), (7200, True)])
def test_what_another_host_left_is_removed_once_it_is_old(age: float, removed: bool, tmp_path: Path) -> None:
    path = tmp_path / ".hpcdit-elsewhere-123-abcd.part"
    path.write_bytes(NEW)
    os.utime(path, (time.time() - age, time.time() - age))
    assert atomic.clean(tmp_path) == [path] * removed
    assert path.exists() is not removed


@pytest.mark.parametrize(("age", "removed"), [(60, False), (7200, True)])
def test_without_locks_only_age_tells_what_is_dead(
    age: float, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    atomic.write(tmp_path / "file", NEW)
    path = tmp_path / f".hpcdit-{atomic._host()}-123-abcd.part"
    path.write_bytes(NEW)
    os.utime(path, (time.time() - age, time.time() - age))
    assert atomic.clean(tmp_path) == [path] * removed
    assert (tmp_path / "file").read_bytes() == NEW


def test_cleaning_leaves_other_files_alone(tmp_path: Path) -> None:
    for name in ("a.h5", ".hidden", "b.part", ".hpcdit-notes"):
        (tmp_path / name).write_bytes(OLD)
        os.utime(tmp_path / name, (0, 0))
    assert atomic.clean(tmp_path) == [] and len(os.listdir(tmp_path)) == 4


def test_a_writer_whose_new_file_is_cleaned_away_takes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = atomic.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(atomic.fcntl, "flock", flock)
        assert len(atomic.clean(tmp_path)) == 1
        flock(descriptor, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    atomic.write(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW and os.listdir(tmp_path) == ["file"]

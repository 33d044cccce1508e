"""What may go wrong, and when; what the program is to do then."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .processes import Program, kill_all, send

DISK = "disk"  # in a round's folder; the output is in disk/out
DISK_BYTES = 32 << 20
LOOK_S = 0.0005  # between two looks for a file that is there for a millisecond
ROOT = os.geteuid() == 0


@dataclass(frozen=True)
class Left:
    """What earlier runs have left in an output folder: bytes of their logs, finished videos, half of others."""

    logs: Mapping[str, int]
    finished: int
    parts: frozenset[str]

    @classmethod
    def by(cls, out: Path) -> "Left":
        logs = {path.name: path.stat().st_size for path in out.glob("run*.log")}
        return cls(logs, len(finished(out)), frozenset(path.name for path in out.glob("videos/*.part")))


@dataclass(frozen=True)
class Scene:
    """A round at the moment of its fault. program: the run that is hit; rank: of it; ranks: of all runs there.

    left: by the rounds before it; videos: that are to be made.
    """

    folder: Path
    program: Program
    rank: int
    ranks: int
    left: Left
    videos: int

    @property
    def out(self) -> Path:
        return self.folder / DISK / "out"

    def log(self) -> str:
        """What the logs of this round's runs say."""
        return log(self.out, self.left.logs)

    def writing(self) -> int | None:
        """The process that is writing a video; None if none is."""
        with contextlib.suppress(FileNotFoundError):
            for name in set(os.listdir(self.out / "videos")) - self.left.parts:
                if found := re.fullmatch(r"\.hpcdit-.*-(\d+)-[0-9a-f]+\.part", name):
                    return int(found[1])
        return None


@dataclass(frozen=True)
class Expected:
    """What is seen of the run that was hit: exit codes (none: any but 0) and what it says, a pattern."""

    codes: tuple[int, ...] = ()
    says: str = ""


def kill_rank(scene: Scene) -> Expected:
    guard, work = scene.program.rank(scene.rank)
    if work is None:  # it is only being started: nobody is there to tell of it
        send(guard or scene.program.process.pid, signal.SIGKILL)
        return Expected()
    send(work, signal.SIGKILL)
    return Expected((4,), rf"rank {scene.rank} .*SIGKILL")


def kill_guard(scene: Scene) -> Expected:
    guard, _ = scene.program.rank(scene.rank)
    send(guard or scene.program.process.pid, signal.SIGKILL)
    return Expected()


def kill_all_ranks(scene: Scene) -> Expected:
    work = scene.program.all_work()
    if not work:
        return kill_rank(scene)
    for pid in work:
        send(pid, signal.SIGKILL)
    return Expected((4,), "SIGKILL") if len(work) == scene.program.ranks else Expected()


def kill_writer(scene: Scene) -> Expected:
    """The process that is writing a video; the moment is when one does."""
    pid = scene.writing()
    if pid is None:
        return kill_rank(scene)
    send(pid, signal.SIGKILL)
    return Expected((4,), rf"process {pid}\) was killed by SIGKILL")


def kill_launcher(scene: Scene) -> Expected:
    send(scene.program.process.pid, signal.SIGKILL)
    return Expected((-9,))


def power_off(scene: Scene) -> Expected:
    kill_all(scene.program.mark)
    return Expected((-9,))


def stop_rank(scene: Scene) -> Expected:
    guard, work = scene.program.rank(scene.rank)
    send(work or guard or scene.program.process.pid, signal.SIGSTOP)
    noticed = rf"no sign of life from rank {scene.rank}|rank {scene.rank} .* was stopped, did not go on"
    return Expected((4,), rf"{noticed}|MPI neither started nor ended in time")


def ask_to_stop(scene: Scene) -> Expected:
    guard, work = scene.program.rank(scene.rank)
    send(guard or scene.program.process.pid, signal.SIGTERM)
    # 0: each group was at its last videos. Before the ranks listen, they end without a word.
    return Expected((0, 75), "stopped on request" if scene.log() else "") if work else Expected()


def fill_disk(scene: Scene) -> Expected:
    with open(scene.folder / DISK / "filler", "wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(size))
    return Expected((0, 2, 4), os.strerror(errno.ENOSPC) + "|are free on that disk")


def empty_disk(scene: Scene) -> None:
    (scene.folder / DISK / "filler").unlink(missing_ok=True)


def make_read_only(scene: Scene) -> Expected:
    disk = scene.folder / DISK
    if ROOT:  # nothing is denied to root but by a mount; over itself, since files are open on the disk
        frozen = scene.folder / "frozen"  # made read-only aside: a mount refuses to while a file is written on it
        frozen.mkdir(exist_ok=True)
        mount("--bind", str(disk), str(frozen))
        mount("-o", "remount,bind,ro", str(frozen))
        mount("--bind", str(frozen), str(disk))
        unmount(frozen)
    else:
        for place in _folders(disk):
            place.chmod(0o555)
    return Expected((0, 2, 4), os.strerror(errno.EROFS if ROOT else errno.EACCES))


def make_writable(scene: Scene) -> None:
    if ROOT:
        unmount(scene.folder / DISK)
    else:
        for place in _folders(scene.folder / DISK):
            place.chmod(0o755)


def _folders(disk: Path) -> list[Path]:
    return [place for place in (disk, disk / "out", disk / "out/videos") if place.exists()]


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def mounted(place: Path) -> bool:
    """Also where a folder is mounted over itself, which os.path.ismount does not see."""
    return any(line.split()[4] == str(place) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def unmount(place: Path) -> None:
    if mounted(place):
        subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


@contextlib.contextmanager
def disk(folder: Path, small: bool) -> Iterator[None]:
    """The place of the output, a small disk of its own if asked for; nothing stays mounted."""
    place = folder / DISK
    place.mkdir()
    if small:
        mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place))
    try:
        yield
    finally:
        while mounted(place):
            unmount(place)


def no_small_disk() -> str:
    """Why there can be no small disk here; empty if there can."""
    if not ROOT:
        return "needs root, to mount a small disk"
    return ""


MOMENTS = ("start", "load", "denoise", "write", "end")


@dataclass(frozen=True)
class Fault:
    """hit: does it and says what is to be seen; undo: before the run is resumed. at: the moments that it may come at.

    ranks: that it needs at least; launcher: whether it needs mpirun; slow: noticed when something is written next, or
    obeyed when a step has ended, not within transport.timeout_s; disk: on a small one; alone: on a run that shares its
    folder with none; others: whether runs that share it are hit as well.
    """

    hit: Callable[[Scene], Expected]
    undo: Callable[[Scene], None] = lambda scene: None
    at: tuple[str, ...] = MOMENTS
    ranks: int = 1
    launcher: bool = False
    slow: bool = False
    disk: bool = False
    alone: bool = False
    others: bool = False


# At the start there may be no work yet, and of a guard or a launcher that stands still nobody knows.
STARTED = MOMENTS[1:]
FAULTS = {
    "rank": Fault(kill_rank),
    "writer": Fault(kill_writer, at=("write",), alone=True),
    "stop": Fault(stop_rank, at=STARTED, ranks=2),
    "mpirun": Fault(kill_launcher, launcher=True),
    "full": Fault(fill_disk, empty_disk, slow=True, disk=True, others=True),
    "all": Fault(kill_all_ranks),
    "guard": Fault(kill_guard),
    "readonly": Fault(make_read_only, make_writable, slow=True, others=True),
    "term": Fault(ask_to_stop, slow=True),
    "power": Fault(power_off),
}


@dataclass(frozen=True)
class Moment:
    """name: of MOMENTS; share: 0 to 1, how far into it; video: the how-manieth is waited for, from 0."""

    name: str
    share: float
    video: int

    def come(self, scene: Scene, pace: dict[str, float], deadline: float) -> bool:
        """Waits for the moment; whether it came before the run ended. pace: seconds that each takes."""
        reached = getattr(self, f"_{self.name}")
        while not reached(scene):
            if scene.program.ended() or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S if self.name == "write" else 0.01)
        time.sleep(self.share * pace[self.name])
        return not scene.program.ended()

    def _start(self, scene: Scene) -> bool:
        return True

    def _load(self, scene: Scene) -> bool:
        return scene.log().count(", pid ") >= scene.ranks

    def _denoise(self, scene: Scene) -> bool:
        return len(re.findall(r": starts", scene.log())) > self.video

    def _write(self, scene: Scene) -> bool:
        return len(finished(scene.out)) >= scene.left.finished + self.video and scene.writing() is not None

    def _end(self, scene: Scene) -> bool:
        return len(finished(scene.out)) == scene.videos


def log(out: Path, after: Mapping[str, int] | None = None) -> str:
    """What the logs of all runs say, each `after` so many bytes."""
    start = after or {}
    return "".join(path.read_bytes()[start.get(path.name, 0) :].decode() for path in out.glob("run*.log"))


def finished(out: Path) -> list[Path]:
    return sorted((out / "videos").glob("[!.]*"))

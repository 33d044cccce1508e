"""Which run renders which video, where several runs share an output folder: the files of `<output_dir>/claims/`.

A claim on a video is the file `<id>.<n>`, made by exclusive creation, which every file system has, NFS included; locks
are not needed. A run renews its claims by setting their time for as long as it lives; one that was not renewed for
`stale_s` is void. It is taken over by making `<id>.<n+1>`, which only one run can, never by removing or replacing it:
a run that was slow to look would remove what another has just made. Times are all the file system's own, so that the
clocks of hosts need not agree.

A video that fails is marked by the file `<id>.failed`, with the reason, and no other run tries it, for as long as runs
that share the folder go on. A run that starts when no other is at work removes the marks: whoever restarts wants those
videos tried again. A killed run counts as at work for `stale_s`, but not on its own host, where its process is gone.
"""

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

FOLDER, FAILED = "claims", "failed"
RENEW_S = 10.0  # between renewals at most; a tenth of stale_s where that is less


class Claims:
    """One run's claims in an output folder. `take` and `release` are for one thread; another one renews.

    name: of the run, unlike any other's that is alive, as run_name gives it; stale_s: seconds.
    """

    def __init__(self, output_dir: Path, name: str, stale_s: float) -> None:
        self._folder, self._stale_s = Path(output_dir) / FOLDER, stale_s
        self._videos = Path(output_dir) / "videos"
        self._about = json.dumps({"run": name, "began": time.strftime("%Y-%m-%d %H:%M:%S")}).encode() + b"\n"
        self._clock = self._folder / f".{name}"  # a file whose time is set, to see what the file system's clock says
        self._held: dict[str, Path] = {}
        self._now()
        self._forget_failures()
        self._closed = threading.Event()
        self.pause_s = min(RENEW_S, stale_s / 10) / 4  # before it makes sense to look again at others' claims
        self._renewing = threading.Thread(target=self._renew, name="hpcdit-claims", daemon=True)
        self._renewing.start()

    def take(self, id: str) -> bool:
        """Whether the video is this run's to render now: nobody else's, not there yet, not failed. Raises OSError."""
        if self.there(id) or self.failed(id):
            return False
        found = self._claims(id)
        if any(self._alive(path) for path in found.values()):
            return False
        number = max(found, default=-1) + 1
        mine = self._folder / f"{id}.{number}"
        try:
            self._make(mine)
        except FileExistsError:
            return False
        # Another run may have looked at a time when others held it, and have made a claim of a lower or higher number.
        rivals = [path for n, path in self._claims(id).items() if n != number]
        if any(self._alive(path) for path in rivals) or self.there(id) or self.failed(id):
            mine.unlink(missing_ok=True)
            return False
        self._held[id] = mine
        for path in rivals:
            path.unlink(missing_ok=True)
        return True

    def there(self, id: str) -> bool:
        """Whether the video is finished, by whomever."""
        return os.path.lexists(self._videos / f"{id}.h5")

    def failed(self, id: str) -> bool:
        """Whether a run that shares the folder has failed at the video."""
        return os.path.lexists(self._folder / f"{id}.{FAILED}")

    def sign(self, id: str) -> tuple[str, int] | None:
        """The newest claim on a video and its time, which a living holder moves on; None where there is none."""
        found = self._claims(id)
        time_ns = self._time_ns(found[max(found)]) if found else None
        return None if time_ns is None else (found[max(found)].name, time_ns)

    def fail(self, id: str, reason: str) -> None:
        """Gives up a claim on a video that cannot be made, and leaves that to be seen by all."""
        with suppress(OSError):  # then another run tries it as well
            self._make(self._folder / f"{id}.{FAILED}", reason.encode(errors="replace"))
        self.release(id)

    def release(self, id: str) -> None:
        """Gives up a claim, because the video is there, or is left to others."""
        if path := self._held.pop(id, None):
            with suppress(OSError):  # it is void in a while
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives up all claims, and removes what dead runs have left and nobody heeds."""
        self._closed.set()
        self._renewing.join(5)  # a file system that hangs is no reason to hang here
        for id in list(self._held):
            self.release(id)
        with suppress(OSError):
            for path in self._folder.iterdir():
                if self.there(path.name.rpartition(".")[0]) or (path.name[0] == "." and not self._alive(path)):
                    path.unlink(missing_ok=True)
            self._forget_failures()
            self._clock.unlink(missing_ok=True)
            self._folder.rmdir()  # if this was the last run

    def _forget_failures(self) -> None:
        """For whoever comes later to try again; not while others are here."""
        runs = [path for path in self._folder.glob(".*") if path != self._clock]
        if not any(self._alive(path) and not _ended(path.name[1:]) for path in runs):
            for path in self._folder.glob(f"*.{FAILED}"):
                path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._closed.wait(4 * self.pause_s):
            for path in [self._clock, *self._held.values()]:
                with suppress(OSError):  # taken over, while this run did not run; or a file system in trouble
                    os.utime(path)

    def _make(self, path: Path, about: bytes = b"") -> None:
        self._folder.mkdir(exist_ok=True)  # the last run to end removes it
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, about or self._about)
        finally:
            os.close(descriptor)

    def _claims(self, id: str) -> dict[int, Path]:
        """All claims on a video, by number."""
        try:
            names = [name.rpartition(".") for name in os.listdir(self._folder)]
        except FileNotFoundError:
            return {}
        return {int(n): self._folder / f"{stem}.{n}" for stem, _, n in names if stem == id and n.isdecimal()}

    def _alive(self, path: Path) -> bool:
        time_ns = self._time_ns(path)
        return time_ns is not None and self._now() - time_ns < self._stale_s * 1e9

    def _now(self) -> int:
        """The file system's clock, in ns."""
        try:
            os.utime(self._clock)
        except FileNotFoundError:
            self._make(self._clock)
        return os.stat(self._clock).st_mtime_ns

    @staticmethod
    def _time_ns(path: Path) -> int | None:
        """When a claim was last renewed; None if it is gone. Opened, since NFS asks the server only then."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)


def failures(output_dir: Path) -> dict[str, str]:
    """Why videos have failed in runs that share the folder, by id."""
    found = {}
    for path in (Path(output_dir) / FOLDER).glob(f"*.{FAILED}"):
        with suppress(OSError):
            found[path.name.removesuffix(f".{FAILED}")] = path.read_text(errors="replace")
    return found


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in os.uname().nodename)[:64]


def _ended(name: str) -> bool:
    """Whether the run of this name is known to have ended: it was of this host, and its process is gone."""
    rest, _, process = name.rpartition("-")
    if rest.rpartition("-")[2] != _host() or not (process.isascii() and process.isdecimal()):
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def run_name() -> str:
    """What a run that shares its folder is called: by the batch system's number if there is one, host and process."""
    env, host = os.environ, _host()
    array, task = env.get("SLURM_ARRAY_JOB_ID", ""), env.get("SLURM_ARRAY_TASK_ID", "")
    job = f"{array}_{task}" if array.isdigit() and task.isdigit() else env.get("SLURM_JOB_ID", "")
    return "-".join([job] * job.replace("_", "").isdigit() + [host, str(os.getpid())])

"""Everything that can be wrong with a run, found by one rank in about a second, before anything expensive starts."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..config import Config, Sampling, demo_model, demo_prompts, resolve_sampling
from ..errors import InputError
from ..models.loading import ModelFolder, ModelShape, inspect, shape
from ..models.lora import with_lora
from ..output import atomic
from ..output.catalog import NAME as CATALOG
from ..output.claims import FOLDER as CLAIMS
from ..output.packing import INSTALL, lacks_plugin
from ..planner.search import legal
from .manifest import Job, estimate_bytes, fits, read
from .plan import fixed, workload
from .resume import resume

if TYPE_CHECKING:
    from ..group import Group

LOCK = ".lock"
CHECKPOINTS = "checkpoints"  # the folder of checkpoints.py, which imports torch
FILES = (LOCK, "run.log", "job.h5", CATALOG)  # what a run writes beside the videos


@dataclass(frozen=True)
class Batch:
    """A checked run: the model, the jobs to be rendered, those that are done already, those of other runs' shares."""

    folder: ModelFolder
    todo: tuple[Job, ...]
    done: tuple[Job, ...]
    others: tuple[Job, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON's types, for the other ranks."""

        def rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:  # ten thousand: asdict takes ten times as long
            return [{**vars(job), "sampling": vars(job.sampling)} for job in jobs]

        folder = {**vars(self.folder), "path": str(self.folder.path)}
        return {"folder": folder, "todo": rows(self.todo), "done": rows(self.done), "others": rows(self.others)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Batch":
        def jobs(rows: Sequence[Mapping[str, Any]]) -> tuple[Job, ...]:
            return tuple(Job(**{**row, "sampling": Sampling(**row["sampling"])}) for row in rows)

        folder = {**values["folder"], "path": Path(values["folder"]["path"])}
        return cls(ModelFolder(**folder), *(jobs(values[part]) for part in ("todo", "done", "others")))

    @property
    def shape(self) -> ModelShape:
        return shape(self.folder)

    @property
    def jobs(self) -> list[Job]:
        return sorted((*self.todo, *self.done, *self.others), key=lambda job: job.index)


def prepare(config: Config, nodes: Sequence[int]) -> Batch:
    """Reads and checks prompts, model folder, sizes, layout and output folder. Raises InputError.

    Leaves no trace, but lines in the catalog for videos that had none.
    """
    folder = inspect(Path(config.model.path) if config.model.path else demo_model())
    if config.model.lora:
        folder = with_lora(folder, *config.model.lora)
    defaults, model = resolve_sampling(config, folder.family), shape(folder)
    defaults = replace(defaults, scheduler=defaults.scheduler or folder.scheduler)
    jobs = read(Path(config.prompts) if config.prompts else demo_prompts(), defaults)
    fits(jobs, defaults, model)
    if config.parallel.vae == "rows":
        check_rows(folder)
    work = workload(model, [job.sampling for job in jobs], config.model.dtype, config.parallel.batch)
    legal(work, nodes, fixed(config.parallel))
    check_compression(config.output.compression)
    check_links(Path(config.output.dir))
    left, done = resume(config, folder, jobs)
    todo = tuple(job for job in left if config.queue.mine(job.index))
    check_output(Path(config.output.dir), estimate_bytes(todo, config.trace.level > 0))
    return Batch(folder, todo, done, tuple(job for job in left if not config.queue.mine(job.index)))


def as_it_is_now(config: Config, world: "Group", nodes: Sequence[int], batch: Batch) -> Batch:
    """The batch without the videos that another run has made since `prepare` looked, before it let go of the folder.

    Collective; to be called while the output folder is held.
    """

    def late() -> bool:
        with os.scandir(Path(config.output.dir) / "videos") as there:
            return not {f"{job.id}.h5" for job in batch.todo}.isdisjoint(entry.name for entry in there)

    if not world.agree(late, "the output folder"):
        return batch
    return Batch.from_dict(world.agree(lambda: prepare(config, nodes).to_dict(), "the prompts"))


def check_rows(folder: ModelFolder) -> None:
    """Raises InputError where the model's VAE cannot be computed some rows a rank."""
    from ..models.rows import CLASSES  # imports torch, which what is checked here takes no second for else

    name = folder.index["vae"][1]
    if name not in CLASSES:
        raise InputError(
            f"parallel.vae=rows: {folder.path / 'vae'}: {name} cannot be cut into rows; allowed: auto or whole, or a"
            f" model with {', '.join(CLASSES)}"
        )


def check_compression(way: str) -> None:
    """Raises InputError where the plugin that it needs is not installed."""
    if lacks_plugin(way):
        raise InputError(f"output.compression={way}: needs a plugin of HDF5; allowed: {INSTALL}, or gzip, lzf or none")


def check_links(folder: Path) -> None:
    """Raises InputError where something in the output folder leads out of it; the folder itself may be a link."""
    for name in (*FILES, "videos", CLAIMS, CHECKPOINTS):
        try:
            link = (folder / name).is_symlink()
        except OSError as error:  # a folder of somebody else's, on the way there
            raise _unwritable(folder, error) from None
        if link:
            raise InputError(
                f"output.dir={folder}: {folder / name} is a symbolic link; allowed: one for the output folder itself"
            )


def check_output(folder: Path, need: int) -> None:
    """Raises InputError unless `need` bytes can be written into `folder`; makes nothing that stays."""
    place = folder
    while not place.exists() and not place.is_symlink():
        place = place.parent
    try:
        for there in (place, *(folder / name for name in ("videos", CHECKPOINTS, CLAIMS))):
            if there == place or os.path.lexists(there):
                _try_folder(there)
        for name in FILES:
            if os.path.lexists(folder / name):
                os.close(os.open(folder / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise _unwritable(folder, error) from None
    if free < need:
        raise InputError(
            f"output.dir={folder}: the videos may need {need / 1e9:.3g} GB, {free / 1e9:.3g} GB are free on that disk;"
            " allowed: a disk with more room, fewer or smaller videos, or trace.level=0 (a trace may take some MiB)"
        )


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"output.dir={folder}: cannot be written: {error.filename}: {error.strerror}")


def _try_folder(there: Path) -> None:
    """Raises OSError unless files can be made in `there`, and seen."""
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(there))
    try:
        os.scandir(there).close()  # else finished videos would count as missing
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(there)) from None


@contextlib.contextmanager
def output_folder(folder: Path, shared: bool = False) -> Iterator[Path]:
    """Makes the output folder and holds it for this run, or for all runs that share it; gives the videos' folder.

    Raises InputError if it is held otherwise.

    The lock is the kernel's: it goes with the process, however that ends. Where the run turns out to have bad input
    (a model that does not load, say), what was made for it is removed again, but nothing that another run may use.
    """
    videos = folder / "videos"
    made = [place for place in (videos, *videos.parents) if not os.path.lexists(place)]
    fresh = [folder / name for name in FILES if not (shared or os.path.lexists(folder / name))]
    try:  # once more: the disk may have filled, or gone, since `check_output` looked
        videos.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(folder, error) from None
    with open(descriptor, "w") as lock:
        _hold(lock, folder, shared)
        for place in (folder, videos):
            atomic.clean(place)
        try:
            yield videos
        except InputError:
            for file in fresh:
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: somebody else's
                for place in made:
                    place.rmdir()
            raise


def _hold(lock: IO[str], folder: Path, shared: bool) -> None:
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"output.dir={folder}: another run is writing there; allowed: another output.dir, or queue.shared=true for"
            " all runs"
        ) from None
    except OSError:
        pass  # a file system without locks: then nobody can be kept out, and each video is still written whole

"""Which of the jobs are done already: what the finished videos hold, beside what is asked for."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from hpcdit.command_line import shown

from ..config import Config
from ..errors import InputError
from ..models.loading import ModelFolder
from ..output.catalog import Catalog, Entry
from .manifest import Job


def resume(config: Config, folder: ModelFolder, jobs: Sequence[Job]) -> tuple[tuple[Job, ...], tuple[Job, ...]]:
    """(todo, done): a job is done if its file holds what is asked for. Raises InputError if it holds anything else."""
    videos, found = Path(config.output.dir) / "videos", dict[str, Entry]()
    catalog = Catalog(Path(config.output.dir))
    for job in jobs:
        if job.id not in catalog.files:
            continue
        path = videos / f"{job.id}.h5"
        if not config.resume:
            raise InputError(f"resume=false: {path} exists; allowed: another output.dir, or resume=true to keep it")
        try:
            found[job.id] = catalog.entry(job.id)
        except (ValueError, OSError) as error:
            raise InputError(f"{error}; remove it to have it rendered again") from None
        theirs = found[job.id].model.get("fingerprint")
        if theirs != folder.fingerprint:
            raise InputError(
                f"{path} was made by another model ({found[job.id].model.get('name')}, weights {str(theirs)[:12]}) than"
                f" is asked for now ({folder.path}, weights {folder.fingerprint[:12]}); allowed: another output.dir"
            )
    for name, entry in found.items():
        if (theirs := entry.model.get("dtype")) != config.model.dtype:
            raise InputError(
                f"model.dtype={config.model.dtype}: the finished {videos / name}.h5 was made in {theirs}; allowed:"
                f" {theirs}, or another output.dir"
            )
    done, todo = partition(jobs, {name: key_of(entry, folder.scheduler) for name, entry in found.items()})
    return todo, done


def key_of(entry: Entry, own: str) -> dict[str, Any]:
    """What identifies its content. own: the scheduler of all videos that were made before there was a choice."""
    key = entry.key()
    return {**key, "sampling": {"scheduler": own, **key["sampling"]}}


def partition(jobs: Iterable[Job], records: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[Job, ...], tuple[Job, ...]]:
    """Splits the jobs into (done, to do). records: `Job.key()` of each finished video, by its id.

    A finished video stays what it is: raises InputError where its id is now asked for with other content.
    """
    done, todo, others = [], [], []
    for job in jobs:
        if job.id not in records:
            todo.append(job)
        elif (asked := _flat(job.key())) == (found := _flat(records[job.id])):
            done.append(job)
        else:
            others.append((job, asked, found))
    if others:
        job, asked, found = others[0]
        key = next(k for k in asked | found if k not in asked or k not in found or asked[k] != found[k])
        wanted, there = _apart(asked.get(key), found.get(key))
        many = f" ({len(others)} such videos)" if len(others) > 1 else ""
        raise InputError(
            f"{job.where}: {key}: {wanted} is asked for, but the finished videos/{job.id}.h5 has {there}"
            f"{many}; allowed: the same content, another id, or another output.dir"
        )
    return tuple(done), tuple(todo)


def _apart(one: object, other: object) -> tuple[str, str]:
    """Two values as shown, long texts from shortly before the place where they differ."""
    if isinstance(one, str) and isinstance(other, str):
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        start = sum(1 for _ in alike) - 20
        if start > 20:
            one, other = f"...{one[start:]}", f"...{other[start:]}"
    return shown(one), shown(other)


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """`{"sampling": {"seed": 1}}` as `{"sampling.seed": 1}`, so that two can be compared value by value."""
    flat = {name: value for name, value in key.items() if name != "sampling"}
    return flat | {f"sampling.{name}": value for name, value in key["sampling"].items()}

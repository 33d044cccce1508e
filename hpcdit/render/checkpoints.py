"""Checkpoints of denoisings under way: a file a video, from which the same command goes on.

`<output.dir>/checkpoints/<id>.safetensors`: the latents, what the scheduler remembers, and in the metadata what the
video is. Written beside the computation, whole or not at all.
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..models.base import Snapshot
from ..models.resume import mapped
from ..output import atomic
from .batch import CHECKPOINTS
from .manifest import Job

SUFFIX, FORMAT = ".safetensors", "hpcdit-checkpoint/1"
WORTH_S = 60.0  # of denoising that are kept when it has ended, though none is due: the decoding may yet be killed


def pack(snapshot: Snapshot, video: int, key: dict[str, Any]) -> bytes:
    """One video of a batch as a safetensors file. key: what it has to be asked for with, in JSON's types."""
    shape, tensors = snapshot.latents.shape, dict[str, torch.Tensor]()

    def keep(x: torch.Tensor) -> dict[str, str]:
        name = f"tensor {len(tensors)}"
        # What is as large as the latents holds a row a video.
        tensors[name] = (x[video : video + 1] if x.shape == shape else x).to("cpu", copy=True).contiguous()
        return {"tensor": name}

    state = {name: mapped(value, keep) for name, value in snapshot.state.items()}
    latents = keep(snapshot.latents)
    said = {"format": FORMAT, "step": snapshot.step, "latents": latents, "state": state, "key": key}
    return save(tensors, {name: json.dumps(value) for name, value in said.items()})


def unpack(data: bytes) -> tuple[Snapshot, dict[str, Any]]:
    """The snapshot of one video and its key. Raises ValueError if this is no whole checkpoint."""
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        said = {name: json.loads(value) for name, value in json.loads(data[8 : 8 + size])["__metadata__"].items()}
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}, not {FORMAT!r}")

        def found(value: Any) -> Any:
            if isinstance(value, list):
                return [found(part) for part in value]
            return tensors[value["tensor"]] if isinstance(value, dict) else value

        state = {name: found(value) for name, value in said["state"].items()}
        return Snapshot(int(said["step"]), found(said["latents"]), state), said["key"]
    except (SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def join(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Several videos at the same step as one batch."""
    first = snapshots[0]

    def together(parts: Sequence[Any]) -> Any:
        one = parts[0]
        if isinstance(one, list):
            return [together(row) for row in zip(*parts, strict=True)]
        whole = isinstance(one, torch.Tensor) and one.shape == first.latents.shape
        return torch.cat(list(parts)) if whole else one

    state = {name: together([snapshot.state[name] for snapshot in snapshots]) for name in first.state}
    return Snapshot(first.step, torch.cat([snapshot.latents for snapshot in snapshots]), state)


@dataclass
class Checkpoints:
    """Those of a group of ranks, on its first rank.

    folder: of the output; seconds: between two of a video, None: none are written; model: what the videos' model is.
    said: what the log should tell, to be taken from there.
    """

    folder: Path
    seconds: float | None
    model: dict[str, Any]
    said: deque[str] = field(default_factory=deque)
    _since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.folder = self.folder / CHECKPOINTS
        self._pool = ThreadPoolExecutor(1, "hpcdit-checkpoints")
        self._last: Future[None] | None = None

    def key(self, job: Job) -> dict[str, Any]:
        """What has to be the same where a checkpoint is used."""
        made = {**job.key(), "model": self.model, "diffusers": metadata.version("diffusers")}
        return dict(json.loads(json.dumps(made)))

    def begin(self) -> None:
        """A denoising begins."""
        self._since = time.monotonic()

    def step(self, jobs: Sequence[Job], take: Callable[[], Snapshot], last: bool) -> None:
        """A step has ended: writes checkpoints if they are due. last: no more steps follow."""
        passed = time.monotonic() - self._since
        seconds = math.inf if self.seconds is None else self.seconds
        if last:
            due = passed >= min(seconds, WORTH_S)
        else:  # a slow disk holds nothing up, and snapshots do not pile up
            due = passed >= seconds and (self._last is None or self._last.done())
        if due:
            self.write(jobs, take)

    def write(self, jobs: Sequence[Job], take: Callable[[], Snapshot]) -> None:
        """Writes a checkpoint of each of `jobs`, beside what else this process does; raises nothing."""
        if self.seconds is None:
            return
        self._since = time.monotonic()
        try:
            self._last = self._pool.submit(self._write, jobs, take())
        except Exception as error:
            self.said.append(f"no checkpoint of {jobs[0].id}: {error}")

    def _write(self, jobs: Sequence[Job], snapshot: Snapshot) -> None:
        try:
            for i, job in enumerate(jobs):
                if snapshot.latents[i].isfinite().all():  # else there is nothing to go on from
                    self.folder.mkdir(exist_ok=True)
                    atomic.write(self._path(job.id), pack(snapshot, i, self.key(job)), replace=True)
        except Exception as error:
            self.said.append(f"no checkpoint of {jobs[0].id} after step {snapshot.step}: {error}")

    def read(self, job: Job) -> bytes:
        """The checkpoint of a video; empty if there is none that fits, and `said` then tells why."""
        self.wait()
        path, steps = self._path(job.id), job.sampling.steps
        try:
            data = path.read_bytes()
            snapshot, key = unpack(data)
            if key != (asked := self.key(job)):
                other = next((name for name in asked if key.get(name) != asked[name]), "key")
                raise ValueError(f"it was made with another {other}")
            if not 0 < snapshot.step <= steps:
                raise ValueError(f"it is of step {snapshot.step} of {steps}")
            return data
        except FileNotFoundError:
            return b""
        except (ValueError, OSError) as error:
            self.said.append(f"{path} is not used: {error}")
            return b""

    def remove(self, name: str) -> None:
        """Removes that of a video that is done, when all that is to be written is."""
        self._pool.submit(self._path(name).unlink, missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def wait(self) -> None:
        """Returns when all is written."""
        if self._last is not None:
            self._last.result()

    def clean(self, done: Iterable[str]) -> None:
        """At the start of a run: removes what was left half-written, or for videos that are done."""
        if self.folder.is_dir():
            atomic.clean(self.folder)
            kept = {path.name for path in self.folder.iterdir()}
            for name in done:
                if f"{name}{SUFFIX}" in kept:
                    self.remove(name)

    def close(self) -> None:
        self._pool.shutdown()
        with suppress(OSError):  # not there, or not empty
            self.folder.rmdir()

"""What must hold of an output folder after a fault, and once the run has been resumed."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from hpcdit.output.store import read_record

from .faults import finished

# What a run leaves in its output folder; logs besides.
LEFT = {".lock", "catalog.jsonl", "job.h5", "videos"}
ROUNDING = 1  # levels of 255: layouts add up in different orders


def hashes(out: Path) -> dict[str, str]:
    """Of the finished videos, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in finished(out)}


def frames(path: Path) -> np.ndarray:
    """uint8 [F, H, W, 3]. Raises what h5py does where the file is damaged."""
    with h5py.File(io.BytesIO(path.read_bytes()), "r") as file:
        return np.asarray(file["frames"][:])


def reference(out: Path) -> dict[str, np.ndarray]:
    return {path.name: frames(path) for path in finished(out)}


def unchanged(before: Mapping[str, str], out: Path) -> list[str]:
    """What is wrong with the videos that were finished `before`."""
    now = hashes(out)
    lost = [f"{name} is lost" for name in before if name not in now]
    return lost + [f"{name} has changed" for name in before if now.get(name, before[name]) != before[name]]


def whole(out: Path, expected: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with the videos that are there: each must be readable and as in the reference."""
    wrong = []
    for path in finished(out):
        if path.name not in expected:
            wrong.append(f"{path.name} is no video of this batch")
            continue
        try:
            read_record(path)
            apart = np.abs(frames(path).astype(int) - expected[path.name]).max()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            wrong.append(f"{path.name} cannot be read: {error}")
            continue
        if apart > ROUNDING:
            wrong.append(f"{path.name} is {apart} levels off the reference")
    return wrong


def complete(out: Path, expected: Mapping[str, np.ndarray], idle: bool) -> list[str]:
    """What is missing or too much in an output folder where everything is to be done.

    idle: there was nothing left to do, and so what a dead run had for its work may stand.
    """
    there = {path.name for path in finished(out)}
    left = LEFT | ({"checkpoints", "claims"} if idle else set())
    wrong = [f"{name} is missing" for name in expected if name not in there]
    more = sorted(path.name for path in (out / "videos").iterdir() if path.name not in expected)
    more += sorted(p.name for p in out.iterdir() if p.name not in left and not p.match("run*.log"))
    wrong += [f"{name} is left over" for name in more]
    with h5py.File(out / "job.h5") as job:
        status = {row["id"].decode(): row["status"].decode() for row in job["jobs"]}
    wanted = {Path(name).stem: "done" for name in expected}
    return wrong + ([] if status == wanted else [f"job.h5 says {status}"])

"""What is stored about a video and a job, and how text and settings are put so that HDF5 can hold them."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # HDF5 strings end at a NUL, and UTF-8 has no lone surrogates


@dataclass(frozen=True)
class VideoRecord:
    """All that is known about a video but its frames.

    The dicts hold what JSON can say; fps: frames a second; seed: 0 to 2**64 - 1; image: sha256 of the
    picture that the video starts from, "" without one.
    """

    id: str
    prompt: str
    negative_prompt: str
    seed: int
    fps: float
    sampling: dict[str, Any]
    model: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    software: dict[str, Any]
    cluster: dict[str, Any]
    image: str = ""


@dataclass(frozen=True)
class Row:
    """One job of the index. status: pending, done or failed (with a reason); seconds: what it took."""

    index: int
    id: str
    prompt: str
    seed: int
    status: str = "pending"
    seconds: float = 0.0
    reason: str = ""


def storable(text: str) -> str:
    """The text as near as HDF5 can hold it: a picture of a NUL for NUL, U+FFFD for lone surrogates."""
    return _UNSTORABLE.sub(lambda found: "\u2400" if found[0] == "\0" else "\ufffd", text)


def to_json(value: dict[str, Any]) -> str:
    """JSON for people: letters as they are. What JSON does not know becomes a list, a number or its text."""

    def plain(other: object) -> object:
        return other.tolist() if isinstance(other, np.generic | np.ndarray) else str(other)

    text = json.dumps(value, ensure_ascii=False, default=plain)
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

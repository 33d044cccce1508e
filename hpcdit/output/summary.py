"""What a report shows of a video at a glance: one small picture, its sizes, and where its time went."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .store import Parts
from .taxes import Rates, Times, measure

SIDE = 160  # pixels of a picture's longer side


@dataclass(frozen=True)
class Summary:
    """picture: WebP in base64, of the frame in the middle; shape: frames, height, width."""

    picture: str
    shape: tuple[int, int, int]
    times: Times

    @classmethod
    def of_parts(cls, parts: Parts) -> "Summary":
        """Of a video that was written without one."""
        return cls.of(parts.middle, parts.count, parts.events, parts.record.plan)

    @classmethod
    def of(cls, middle: np.ndarray, count: int, events: np.ndarray, plan: Mapping[str, Any]) -> "Summary":
        """middle: a frame, uint8 [H, W, 3], of `count`; events: EVENT [n]; plan: as it is stored with the video."""
        priced = plan.get("priced")
        rates = Rates.of(priced.get("costs")) if isinstance(priced, dict) else None
        height, width, _ = middle.shape
        return cls(picture(middle), (count, height, width), measure(events, rates))

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types."""
        return {"picture": self.picture, "shape": list(self.shape), "times": self.times.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Summary":
        """What to_dict made. Raises TypeError or LookupError for anything else."""
        frames, height, width = values["shape"]
        return cls(str(values["picture"]), (int(frames), int(height), int(width)), Times(**values["times"]))


def picture(frame: np.ndarray) -> str:
    """The frame (uint8 [H, W, 3]), reduced where it is larger than `SIDE`, as WebP in base64."""
    image = Image.fromarray(frame)
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=70, method=2)
    return base64.b64encode(data.getbuffer()).decode()

"""What makes a run's MP4 files, and those of videos that were finished without: they may be asked for later."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..config import Sampling
from ..device import Device
from ..errors import BrokenRun
from ..output.media import Encoder, hardware, software, write_mp4
from ..output.store import read_frames


def encoder(device: Device, sizes: Sampling, tell: Callable[[str], None]) -> Encoder:
    """The encoder of the rank's GPU if it has one that starts with frames of these sizes, else the CPU's; told."""
    if device.cuda:
        found, why = hardware(device.torch.index or 0, sizes.height, sizes.width)
    else:
        found, why = software(), ""
    tell(f"MP4 files: {found.name}{why and f', since {why}'}")
    return found


def missing(videos: Path, ids: Iterable[str]) -> list[str]:
    """Which of the finished videos `ids` have no MP4 in `videos`."""
    there = set(os.listdir(videos))
    return [id for id in ids if f"{id}.h5" in there and f"{id}.mp4" not in there]


def make(videos: Path, ids: Iterable[str]) -> int:
    """Writes the MP4 of each finished video that has none yet; how many. Raises BrokenRun where that is impossible."""
    made = 0
    for id in ids:
        path = videos / f"{id}.mp4"
        if os.path.lexists(path):  # by another run that shares the folder
            continue
        try:
            write_mp4(path, *read_frames(path.with_suffix(".h5")))
        except (OSError, ValueError) as error:
            raise BrokenRun(f"{path} cannot be made: {error}; finished videos are whole") from error
        made += 1
    return made

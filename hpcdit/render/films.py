"""MP4 files of videos that were finished without one: `output.video=mp4` may be asked for later."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import BrokenRun
from ..output.media import write_mp4
from ..output.store import read_frames


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

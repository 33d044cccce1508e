"""Draws the videos of a run as one picture: a row of frames for each, its prompt below.

usage: python tools/contact_sheet.py outputs/demo -o sheet.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from hpcdit.output import media
from hpcdit.output.packing import NoPlugin, load_plugin


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws videos as one picture, a row of frames for each.")
    parser.add_argument("videos", nargs="+", type=Path, help="output folders of runs, or video files (.h5)")
    parser.add_argument("-o", "--output", type=Path, default=Path("sheet.png"), help="default: %(default)s")
    parser.add_argument("-c", "--columns", type=int, default=5, help="frames a video, default: %(default)s")
    arguments = parser.parse_args(words)
    try:
        if arguments.columns < 1:
            raise ValueError("--columns must be at least 1")
        clips = [read(path, arguments.columns) for place in arguments.videos for path in files(place)]
        media.contact_sheet(clips, arguments.columns).save(arguments.output)
    except (OSError, ValueError) as error:
        print("contact_sheet:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(clips)} videos")
    return 0


def files(place: Path) -> list[Path]:
    """The video files of an output folder, in the order of their names; a file stands for itself."""
    if not place.is_dir():
        return [place]
    if found := sorted(place.glob("videos/[!.]*.h5")):
        return found
    raise ValueError(f"{place}: no videos/*.h5 in this folder")


def read(path: Path, columns: int) -> tuple[str, np.ndarray]:
    """Prompt and frames of a video, of the frames only those that will be seen."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            frames = file["frames"]
            load_plugin(frames)
            return file.attrs["prompt"], frames[media.spaced(len(frames), columns)]
    except FileNotFoundError:
        raise
    except NoPlugin as error:
        raise ValueError(f"{path}: {error}") from None
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a video of hpcdit ({error})") from error


if __name__ == "__main__":
    sys.exit(main())

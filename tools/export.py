"""Takes frames out of a video: as PNG files, a GIF or an MP4.

usage: python tools/export.py outputs/demo/videos/ID.h5 -o frames/              every frame, frames/00000.png and so on
       python tools/export.py outputs/demo/videos/ID.h5 -o clip.gif -f 0:17:2   every second of the first 17 frames
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from hpcdit.output import atomic, media
from hpcdit.output.packing import NoPlugin, load_plugin

KINDS = (".gif", ".mp4")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Takes frames out of a video: as PNG files, a GIF or an MP4.")
    parser.add_argument("video", type=Path, help="a video file (.h5)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder for PNG files, or a .gif or .mp4")
    parser.add_argument("-f", "--frames", default=":", help="start:stop:step, as Python slices; default: all")
    arguments = parser.parse_args(words)
    try:
        kind = arguments.output.suffix.lower()
        if kind and kind not in KINDS:
            raise ValueError(
                f"--output={arguments.output}: allowed: {' or '.join(KINDS)}, or a folder's name without a dot"
            )
        numbers, frames, fps = read(arguments.video, arguments.frames)
        if kind == ".mp4":
            media.write_mp4(arguments.output, frames, fps)
        elif kind == ".gif":
            atomic.write(arguments.output, gif(frames, fps), replace=True)
        else:
            arguments.output.mkdir(parents=True, exist_ok=True)
            for number, frame in zip(numbers, frames, strict=True):
                Image.fromarray(frame).save(arguments.output / f"{number:05}.png")
    except (OSError, ValueError) as error:
        print("export:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(frames)} frames")
    return 0


def read(path: Path, words: str) -> tuple[range, np.ndarray, float]:
    """The frames' numbers, the frames (uint8 [F, H, W, 3]), and how many are shown a second."""
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as HDF5 ({error})") from None
    with file:
        if "frames" not in file or "fps" not in file["frames"].attrs:
            raise ValueError(f"{path}: not a video of hpcdit, it has no /frames")
        try:
            load_plugin(file["frames"])
        except NoPlugin as error:
            raise ValueError(f"{path}: {error}") from None
        numbers = chosen(words, len(file["frames"]))
        step = abs(numbers.step)
        low, high = min(numbers), max(numbers)
        frames = file["frames"][low : high + 1 : step]
        return numbers, frames[::-1] if numbers.step < 0 else frames, float(file["frames"].attrs["fps"]) / step


def chosen(words: str, count: int) -> range:
    """The numbers that a slice takes of `count` frames; one number is that frame. Raises ValueError for none."""
    try:
        if ":" in words:
            found = range(count)[slice(*(int(part) if part else None for part in words.split(":")))]
        else:
            number = int(words) % count if -count <= int(words) < count else count
            found = range(count)[number : number + 1]
    except (ValueError, TypeError):
        raise ValueError(f"--frames={words}: allowed: a number, or start:stop or start:stop:step") from None
    if not found:
        raise ValueError(f"--frames={words}: there are frames 0 to {count - 1}, these are none of them")
    return found


def gif(frames: np.ndarray, fps: float) -> memoryview:
    """An endless one. A GIF counts time in hundredths of a second, so each frame ends as near as it can to its time."""
    ends = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)
    first, *rest = (Image.fromarray(frame) for frame in frames)
    data = io.BytesIO()
    times = (np.diff(ends) * 10).tolist()
    first.save(data, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    return data.getbuffer()


if __name__ == "__main__":
    sys.exit(main())

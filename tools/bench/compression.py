"""Size, and CPU time to write and to read, of real frames by each way to pack them.

usage: python tools/bench/compression.py outputs/demo
"""

import io
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdit.output.packing import WAYS, lacks_plugin, load_plugin

TRIES = 3


def main() -> int:
    paths = sorted(Path(sys.argv[1]).glob("videos/[!.]*.h5")) if len(sys.argv) == 2 else []
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    clips = []
    for path in paths:
        with h5py.File(path, "r", locking=False) as file:
            load_plugin(file["frames"])
            clips.append(file["frames"][:])
    megabytes = sum(clip.nbytes for clip in clips) / 1e6
    print(f"{len(clips)} videos, {megabytes:.1f} MB of frames")
    for name, how in ways().items():
        runs = [measure(clips, how) for _ in range(TRIES)]
        size, write_s, read_s = (min(column) for column in zip(*runs, strict=True))
        speeds = f"write {megabytes / write_s:4.0f} MB/s, read {megabytes / read_s:4.0f} MB/s"
        print(f"{name:14} {size / megabytes:.3f} of the size, {speeds}")
    return 0


def ways() -> dict[str, dict[str, Any]]:
    """Those that output.compression has, and gzip's other levels."""
    found = {name: how for name, how in WAYS.items() if not lacks_plugin(name)}
    return found | {f"gzip {level}": {"compression": "gzip", "compression_opts": level} for level in (1, 6)}


def measure(clips: list[np.ndarray], how: dict[str, Any]) -> tuple[float, float, float]:
    """Megabytes stored, seconds to write, seconds to read."""
    stored, images, start = 0, [], time.process_time()
    for clip in clips:
        images.append(io.BytesIO())
        with h5py.File(images[-1], "w", libver=("v110", "v110")) as file:
            data = file.create_dataset("frames", clip.shape, np.uint8, chunks=(1, *clip.shape[1:]), **how)
            for i, frame in enumerate(clip):
                data[i] = frame
            stored += data.id.get_storage_size()
    middle = time.process_time()
    for image, clip in zip(images, clips, strict=True):
        with h5py.File(image, "r") as file:
            assert np.array_equal(file["frames"][:], clip)
    return stored / 1e6, middle - start, time.process_time() - middle


if __name__ == "__main__":
    sys.exit(main())

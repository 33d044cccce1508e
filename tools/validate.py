"""Checks that videos are what this version says a video is: attributes by hpcdit/output/schema.json, and each frame.

usage: python tools/validate.py outputs/demo

Exit codes: 0 all are; 1 some are not, a line for each; 2 bad input. Needs jsonschema: pip install jsonschema
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdit.output.packing import load_plugin
from hpcdit.output.trace import EVENT

JSON = ("sampling", "model", "plan", "config", "software", "cluster", "exact")
IMAGE = {"CLASS": b"IMAGE", "IMAGE_SUBCLASS": b"IMAGE_TRUECOLOR", "INTERLACE_MODE": b"INTERLACE_PIXEL"}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks that videos are what this version says a video is.")
    parser.add_argument("videos", nargs="+", type=Path, help="output folders of runs, or video files (.h5)")
    try:
        import jsonschema  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        print("validate: jsonschema is missing: pip install jsonschema", file=sys.stderr)
        return 2
    schema = jsonschema.Draft202012Validator(json.loads((files("hpcdit.output") / "schema.json").read_text("utf-8")))
    paths = [path for place in parser.parse_args(words).videos for path in found(place)]
    if not paths:
        print("validate: no videos/*.h5 there", file=sys.stderr)
        return 2
    wrong = 0
    for path in paths:
        for what in faults(path, schema):
            print(f"{path}: {' '.join(what.split())}")
            wrong += 1
    print(f"{len(paths)} videos, {wrong} faults")
    return 1 if wrong else 0


def found(place: Path) -> list[Path]:
    """The videos of an output folder; a file stands for itself."""
    return sorted(place.glob("videos/[!.]*.h5")) if place.is_dir() else [place]


def faults(path: Path, schema: Any) -> Iterator[str]:
    """What is not as it should be, each in a line."""
    try:
        with path.open("rb") as plain, h5py.File(plain, "r") as file:  # so HDF5 takes no lock
            yield from (f"{error.json_path}: {error.message:.200}" for error in schema.iter_errors(attributes(file)))
            yield from of_frames(file["frames"], json.loads(file.attrs["sampling"]))
            yield from of_images(file.get("images", {}), file["frames"])
            if file["trace/events"].dtype != EVENT:
                yield "/trace/events: not a table of events"
    except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        yield f"cannot be read: {error}"


def attributes(file: h5py.File) -> dict[str, Any]:
    """As JSON has them."""
    read = {name: value.item() if isinstance(value, np.generic) else value for name, value in file.attrs.items()}
    return {name: json.loads(value) if name in JSON else value for name, value in read.items()}


def of_frames(frames: h5py.Dataset, sampling: dict[str, Any]) -> Iterator[str]:
    size = tuple(sampling.get(name) for name in ("num_frames", "height", "width"))
    if frames.dtype != np.uint8 or frames.shape != (*size, 3):
        yield f"/frames: {frames.dtype} {frames.shape}, not uint8 {(*size, 3)}"
    if frames.chunks != (1, *frames.shape[1:]):
        yield f"/frames: chunks of {frames.chunks}, not one a frame"
    if [axis.label for axis in frames.dims] != ["frame", "height", "width", "channel"] or "time" not in frames.dims[0]:
        yield "/frames: its axes are not labelled, or have no scale"
    yield from (f"/frames: {key} is not {value!r}" for key, value in IMAGE.items() if frames.attrs.get(key) != value)
    load_plugin(frames)
    for i in range(len(frames)):
        frames[i]  # raises where it is damaged


def of_images(images: Mapping[str, h5py.Dataset], frames: h5py.Dataset) -> Iterator[str]:
    if sorted(images) != [f"{i:05}" for i in range(len(frames))]:
        yield f"/images: {len(images)} pictures, not one a frame, 00000 to {len(frames) - 1:05}"
    for i, (name, image) in enumerate(sorted(images.items())):
        for key, value in IMAGE.items():
            if image.attrs.get(key) != value:
                yield f"/images/{name}: {key} is not {value!r}"
        if places(image) != [("/frames", (i, 0, 0, 0), (i, *(size - 1 for size in frames.shape[1:])))]:
            yield f"/images/{name}: not the frame of that number"


def places(image: h5py.Dataset) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """What a virtual dataset shows: of which dataset of the same file, from where to where, both ends included."""
    parts = image.virtual_sources() if image.is_virtual else []
    return [(part.dset_name, *part.src_space.get_select_bounds()) for part in parts if part.file_name == "."]


if __name__ == "__main__":
    sys.exit(main())

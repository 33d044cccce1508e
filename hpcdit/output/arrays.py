"""The arrays of an HDF5 file, laid out and marked so that viewers show frames as pictures and spans as a table."""

from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5p, h5s, h5t

from .trace import EVENT

# Of a picture, as the HDF5 Image specification 1.2 has it.
_IMAGE = {
    "CLASS": "IMAGE",
    "IMAGE_VERSION": "1.2",
    "IMAGE_SUBCLASS": "IMAGE_TRUECOLOR",
    "INTERLACE_MODE": "INTERLACE_PIXEL",
}


def write_frames(file: h5py.File, frames: np.ndarray, fps: float, packing: dict[str, Any]) -> None:
    """`/frames`: one chunk a frame, so that one can be read alone; axes labelled, the time of each frame as a scale.

    frames: uint8 [F, H, W, 3]; packing: of `packing.WAYS`.
    """
    chunk = (1, *frames.shape[1:])
    stack = file.create_dataset("frames", frames.shape, np.uint8, chunks=chunk, **packing)
    for i, frame in enumerate(frames):
        stack[i] = frame
    stack.attrs["fps"] = fps
    seconds = file.create_dataset("time", data=np.arange(len(frames)) / fps)
    seconds.attrs["unit"] = "s"
    seconds.make_scale("time")
    for axis, label in enumerate(("frame", "height", "width", "channel")):
        stack.dims[axis].label = label
    stack.dims[0].attach_scale(seconds)
    _mark(stack.id, _IMAGE)  # after the scale: HDF5 2.0 refuses one to what has a class already


def write_images(file: h5py.File, frames: h5py.Dataset) -> None:
    """`/images/00000` and so on: each frame once more as a picture of its own, without its data (a virtual dataset).

    The specification knows no stacks of coloured pictures. h5web shows /frames as one, HDFView takes its first three
    axes for a picture's, and needs these. By HDF5's own functions: a millisecond a frame, h5py's take six.
    """
    images = file.create_group("images").id
    one, stack = h5s.create_simple(frames.shape[1:]), h5s.create_simple(frames.shape)
    for i in range(len(frames)):
        stack.select_hyperslab((i, 0, 0, 0), (1, *frames.shape[1:]))
        view = h5p.create(h5p.DATASET_CREATE)
        view.set_virtual(one, b".", b"/frames", stack)
        _mark(h5d.create(images, b"%05d" % i, h5t.STD_U8LE, one, view), _IMAGE)


def write_events(file: h5py.File, events: np.ndarray) -> None:
    """`/trace/events`, a row a span. events: EVENT [n]."""
    packing = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if len(events) else {}
    table = file.create_dataset("trace/events", data=events, dtype=h5py.Datatype(_event_type()), **packing)
    names = {f"FIELD_{i}_NAME": name for i, name in enumerate(EVENT.names or ())}
    _mark(table.id, {"CLASS": "TABLE", "VERSION": "3.0", "TITLE": "spans of time", **names})


def _mark(data: h5d.DatasetID, attributes: dict[str, str]) -> None:
    """What HDF5's conventions of images and tables have viewers look for: ASCII that ends at a NUL."""
    for name, value in attributes.items():
        kind, size = h5t.C_S1.copy(), len(value) + 1
        kind.set_size(size)
        h5a.create(data, name.encode(), kind, h5s.create(h5s.SCALAR)).write(np.array(value.encode(), f"S{size}"))


def _event_type() -> h5t.TypeID:
    """EVENT with strings that end at a NUL: h5py pads them with NULs, and h5dump prints each of those."""
    row = h5t.create(h5t.COMPOUND, EVENT.itemsize)
    for name, (dtype, offset, *_) in (EVENT.fields or {}).items():
        column = h5t.py_create(dtype, logical=True).copy()
        if dtype.kind == "S":
            column.set_strpad(h5t.STR_NULLTERM)
        row.insert(name.encode(), offset, column)
    return row

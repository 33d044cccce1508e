"""How frames are packed in HDF5 files, always without loss, and the plugin that some ways need.

Measured on real frames: tools/bench/README.md. gzip is what every program that reads HDF5 reads, and packs as tightly
as the others do; so it is the default.
"""

from contextlib import suppress
from typing import Any

import h5py

# Shuffle, which sorts the bytes of wide numbers, did nothing for uint8. The numbers are those under which The HDF Group
# has registered filters; Blosc2 takes four that it sets itself, the level, whether to shuffle, and 5 for zstd.
WAYS: dict[str, dict[str, Any]] = {
    "gzip": {"compression": "gzip", "compression_opts": 4},
    "lzf": {"compression": "lzf"},
    "zstd": {"compression": 32015, "compression_opts": (3,)},
    "blosc2-zstd": {"compression": 32026, "compression_opts": (0, 0, 0, 0, 3, 0, 5)},
    "none": {},
}
INSTALL = "`pip install 'hpcdit[zstd]'`"


class NoPlugin(ValueError):
    """Frames cannot be read, or written, without a plugin of HDF5 that is not installed."""


def lacks_plugin(way: str) -> bool:
    """Whether frames cannot be packed in this way here."""
    number = WAYS[way].get("compression")
    return isinstance(number, int) and not _available(number)


def load_plugin(frames: h5py.Dataset) -> None:
    """Makes sure that the frames can be read. Raises NoPlugin."""
    plan, ways = frames.id.get_create_plist(), {how.get("compression"): way for way, how in WAYS.items()}
    for number in (plan.get_filter(i)[0] for i in range(plan.get_nfilters())):
        if not _available(number):
            raise NoPlugin(f"its frames are packed by {ways.get(number, f'filter {number}')}, of a plugin: {INSTALL}")


def _available(number: int) -> bool:
    """Whether HDF5 has this filter: its own, a site's (HDF5_PLUGIN_PATH), or one of the Python package's."""
    if not h5py.h5z.filter_avail(number):
        with suppress(ImportError):
            import hdf5plugin  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  registers what it has
    return bool(h5py.h5z.filter_avail(number))

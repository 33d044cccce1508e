"""Weights on disk, looked at without torch: safetensors headers, shards, fingerprints; never a pickle."""

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from hpcdit.errors import InputError

JSON_LIMIT = 1 << 26  # bytes; the largest JSON file of a checkpoint is a tokenizer of some 20 MB
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
ENDS = 1 << 16  # bytes hashed at either end of a weight file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """The weight files of one component (and their index where there is one), and each tensor's shape."""

    files: tuple[Path, ...]
    tensors: dict[str, tuple[int, ...]]


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """Opens a regular file for reading; returns it and its size in bytes. Links are followed.

    Raises InputError naming the path: missing, a broken link, a folder, a pipe, empty, not readable, or a
    Git LFS pointer where the file itself should be.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; a file is needed")
        file = path.open("rb")
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"{path}: a broken link, to {os.readlink(path)!r}, which is missing") from None
        raise InputError(f"{path}: no such file; the checkpoint is not complete") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    size = os.fstat(file.fileno()).st_size
    start = file.read(len(POINTER))
    file.seek(0)
    if size == 0 or start == POINTER:
        file.close()
        what = (
            "a Git LFS pointer, not the file itself: run `git lfs pull`" if size else "empty; the copy is not complete"
        )
        raise InputError(f"{path}: {what}")
    return file, size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError naming the path, and the line where it is not JSON."""
    file, size = open_file(path)
    with file:
        if size > JSON_LIMIT:
            raise InputError(f"{path}: {size} bytes; allowed: a JSON file of at most {JSON_LIMIT}")
        text = file.read()
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON: a number too long or objects nested too deep") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes in a safetensors file, from its header alone.

    Eight bytes (header length, little endian), the header in JSON, then the tensors without a gap up to the
    end of the file: a file that was cut off, or grew, is refused with InputError.
    """
    file, size = open_file(path)
    with file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise InputError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text.decode())
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        bits = {name: _bits(entry["dtype"]) for name, entry in header.items()}
        end = 0
        for start, stop, name in spans:
            if start != end or stop < start or prod(shapes[name]) * bits[name] != 8 * (stop - start):
                raise ValueError(name)
            end = stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a safetensors file: its header makes no sense") from None
    if size != 8 + length + end:
        raise InputError(f"{path}: {size} bytes where its header says {8 + length + end}; the copy is not complete")
    return shapes


def find(folder: Path, stem: str, index_first: bool) -> Weights:
    """The weights of the component in `folder`: `stem.safetensors`, or the shards that its index names.

    `index_first`: which of the two counts where both are there (diffusers takes the index, transformers the
    single file). Raises InputError where a file is missing or not whole, and where there are only pickles.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    there = [path for path in (index, single) if path.exists() or path.is_symlink()]
    if not there:
        raise InputError(_missing(folder, single))
    if (there[0] if index_first else there[-1]) == single:
        return Weights((single,), read_header(single))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map: missing; allowed: an object of tensor names and file names")
    shards = sorted({name if _plain(name) else "" for name in weight_map.values()})
    if not shards[0]:
        raise InputError(f"{index}: weight_map: allowed: names of .safetensors files in the same folder")
    tensors: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        header = read_header(folder / shard)
        for tensor in (name for name, file in weight_map.items() if file == shard):
            if tensor not in header:
                raise InputError(f"{folder / shard}: tensor {tensor!r} is missing, which {index.name} says it holds")
            tensors[tensor] = header[tensor]
    return Weights((index, *(folder / shard for shard in shards)), tensors)


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """A name for the content of a checkpoint: sha256, in hexadecimal, over each file's name, size and bytes.

    Of a safetensors file only the header and the first and last 64 KiB of the tensors are read, so that
    28 GB cost milliseconds: two checkpoints that differ nowhere else have the same fingerprint. It depends
    neither on where the folder is nor on dates.
    """
    whole = sha256()
    for path in sorted(files):
        file, size = open_file(path)
        with file:
            whole.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                whole.update(file.read(length + ENDS))
                file.seek(max(size - ENDS, 0))
            whole.update(file.read())
    return whole.hexdigest()


def _bits(dtype: str) -> int:
    """Bits of an element: the number in the name (`BF16`, `F8_E4M3`, `I64`); a truth value takes a byte."""
    return 8 if dtype == "BOOL" else int(dtype.split("_")[0].lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def _plain(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and name.endswith(".safetensors") and Path(name).name == name


def _missing(folder: Path, wanted: Path) -> str:
    """Why a component has no weights, in one line: pickles, a variant of another name, or nothing at all."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles and not others:
        return (
            f"{folder / pickles[0]}: pickled weights, which are never loaded (a pickle can run any program); "
            f"convert them where you trust them: load the pipeline with diffusers, then "
            f"pipe.save_pretrained(folder, safe_serialization=True)"
        )
    found = f"; found {others[0]!r}, a name that is not loaded" if others else ""
    return f"{wanted}: no such file; the checkpoint is not complete{found}"

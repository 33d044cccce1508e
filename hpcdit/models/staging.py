"""A checkpoint as the ranks of a host map it: LoRA fused and in the type that is computed in, once in memory.

A weight file that holds what is computed with is mapped as it is, by diffusers and transformers themselves: all ranks
read the same pages. A part that needs another type or a LoRA is written once, by one rank of the host, into memory
that has a name only while that rank holds it open; a folder of links lets the libraries find it like any checkpoint.
Layers that are to lie elsewhere have files of their own, so that each can be let go of when it is there.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import InputError
from .families import families
from .loading import TRANSFORMERS, ModelFolder
from .lora import Lora
from .weights import find, read_json

PREFIX = "hpcdit-model-"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint. files: where each tensor is; dtypes, shapes: of each tensor, as it is to be loaded."""

    name: str
    stem: str
    files: Mapping[str, Path]
    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]
    changes: bool


@contextmanager
def staged(folder: ModelFolder, dtype: str, lora: Lora | None, shared: bool, apart: bool = False) -> Iterator[Path]:
    """The folder to load instead of `folder.path`, which other processes of this host can load, too, until the end.

    dtype: what all parts but the VAE are computed in; shared: whether there are other ranks on this host; apart:
    whether the transformers' layers will be moved, one after the other. Where neither is so a cast is left to the
    libraries. Raises InputError where the LoRA does not fit.
    """
    remove_left()
    dtypes = {name: torch.float32 if name == "vae" else getattr(torch, dtype) for name in folder.weights}
    parts = [_part(folder.path, name, dtypes[name]) for name in folder.weights]
    if lora:
        lora.check({f"{part.name}.{name}": shape for part in parts for name, shape in part.shapes.items()})
    lists = families()[folder.family].layer_lists() if apart else []

    def needed(part: Part) -> bool:
        return part.changes and (shared or (apart and part.name in TRANSFORMERS))

    todo = [part for part in parts if needed(part) or (lora and lora.touches(part.name))]
    if not todo:
        yield folder.path
        return
    with ExitStack() as stack:
        place = stack.enter_context(_folder_of_links())
        names = {part.name for part in todo}
        _link(folder.path, place, lambda entry: entry.name not in names)
        for part in todo:
            (place / part.name).mkdir()
            _link(folder.path / part.name, place / part.name, _no_weights)
            files = _files(part, lists if part.name in TRANSFORMERS else [])
            for name, tensors in files.items():
                memory = stack.enter_context(os.fdopen(os.memfd_create(f"hpcdit-{part.name}"), "wb"))
                _write(memory, part, tensors, lora)
                (place / part.name / name).symlink_to(f"/proc/{os.getpid()}/fd/{memory.fileno()}")
            if len(files) > 1:
                where = {tensor: name for name, tensors in files.items() for tensor in tensors}
                index = json.dumps({"metadata": {}, "weight_map": where})
                (place / part.name / f"{part.stem}.safetensors.index.json").write_text(index)
        yield place


def _files(part: Part, lists: Sequence[str]) -> dict[str, list[str]]:
    """The weight files of a part, by their names, and the tensors of each; lists: of layers that have one each."""
    found = dict[str, list[str]]()
    for tensor in part.files:
        kind, number, *_ = [*tensor.split("."), ""]
        found.setdefault(f"-{kind}-{number}" if kind in lists else "", []).append(tensor)
    return {f"{part.stem}{layer}.safetensors": tensors for layer, tensors in found.items()}


def remove_left() -> None:
    """Removes folders of links whose makers are dead; a killed process leaves its own behind."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), _locked(left):  # another user's, or of a run that is under way
            shutil.rmtree(left)


@contextmanager
def _folder_of_links() -> Iterator[Path]:
    """A new one, locked as long as this process lives: by the kernel, which knows also of other containers'."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=PREFIX))
        with ExitStack() as stack:
            with suppress(FileNotFoundError):  # another run took it for one that was left, before it was locked
                stack.enter_context(_locked(place, wait=True))
            if place.exists():
                stack.callback(shutil.rmtree, place, ignore_errors=True)
                yield place
                return


@contextmanager
def _locked(place: Path, wait: bool = False) -> Iterator[None]:
    """Raises OSError where it cannot be had, at once unless `wait`."""
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(folder)


def readable(place: Path) -> bool:
    """Whether this process, too, can read what `staged` gave another one of this host."""
    return place.is_dir() and all(os.access(path, os.R_OK) for path in place.glob("*/*.safetensors"))


@contextmanager
def told_of(place: Path, folder: Path) -> Iterator[None]:
    """Errors about the folder of links are told of the user's folder."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(place), str(folder))) from error


def _part(root: Path, name: str, dtype: torch.dtype) -> Part:
    library, kind = read_json(root / "model_index.json")[name]
    stem = STEMS[library]
    weights = find(root / name, stem, index_first=library == "diffusers")
    kept = _kept(getattr(import_module(library), kind), library == "diffusers", dtype)
    files, dtypes, changes = dict[str, Path](), dict[str, torch.dtype](), False
    for path in weights.files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for tensor in weights.tensors.keys() & set(file.keys()):
                    there = file.get_slice(tensor).get_dtype()
                    wanted = torch.float32 if kept & set(tensor.split(".")) else dtype
                    files[tensor] = path
                    dtypes[tensor] = wanted if "F" in there else _named(there)
                    changes |= NAMES[dtypes[tensor]] != there
    return Part(name, stem, files, dtypes, weights.tensors, changes)


def _kept(kind: Any, always: bool, dtype: torch.dtype) -> set[str]:
    """Modules that the library keeps in float32; `always`, or for float16 alone those that are not strict."""
    kept = set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
    if always or dtype == torch.float16:
        kept |= set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    return kept


def _named(name: str) -> torch.dtype:
    return next(dtype for dtype, known in NAMES.items() if known == name)


def _write(memory: Any, part: Part, tensors: Sequence[str], lora: Lora | None) -> None:
    """A safetensors file: one tensor at a time, so that no second copy of the part is ever there."""
    order = sorted(tensors, key=lambda name: (-part.dtypes[name].itemsize, name))  # so each lies aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + prod(part.shapes[name]) * part.dtypes[name].itemsize
        kind = NAMES[part.dtypes[name]]
        header[name] = {"dtype": kind, "shape": part.shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    memory.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        with safe_open(part.files[name], "pt") as file:  # anew each time: what was read is let go of
            tensor = file.get_tensor(name)
        if lora:
            tensor = lora.fused(f"{part.name}.{name}", tensor)
        memory.write(tensor.to(part.dtypes[name]).contiguous().reshape(-1).view(torch.uint8).numpy())
        del tensor
    memory.flush()


def _link(source: Path, place: Path, which: Any) -> None:
    for entry in source.resolve().iterdir():
        if which(entry):
            (place / entry.name).symlink_to(entry)


def _no_weights(entry: Path) -> bool:
    return not entry.name.endswith((".safetensors", ".index.json"))

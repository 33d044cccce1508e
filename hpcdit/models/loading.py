"""A checkpoint folder in diffusers' format, checked before anything is loaded: no torch, no diffusers.

Every fault is an InputError of one line that names the file, the key and what is allowed. A folder that
passes is whole: each component has its configuration and its weights, the weights have the sizes that their
headers say, and the configurations fit each other.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpcdit.errors import InputError
from hpcdit.models import configs
from hpcdit.models.families import families
from hpcdit.models.family import Component, Family
from hpcdit.models.weights import Weights, find, fingerprint, read_json

TRANSFORMERS = "transformer", "transformer_2"  # in the order in which they work
ENCODERS = "text_encoder", "text_encoder_2"
TOKENIZER = "tokenizer_config.json"
FORMAT = "a checkpoint folder in diffusers' format"


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that layouts and sizes depend on.

    patch: latent (frames, rows, columns) of one token; vae_temporal, vae_spatial: pixels per latent along time and
    along height and width; max_patches: tokens in one direction that its rotary table has rows for; multiple: what the
    family's pipeline asks of height and width beyond that; frame_multiple: that of the frames after the first; ffn_dim:
    width of the feed-forward layers. images: whether it makes images, which are videos of one frame; image: whether it
    starts from one; joint: whether the text's tokens are attended together with the video's, in one sequence; beside:
    tokens of the text beside those of max_sequence_length; text: the only max_sequence_length that the model takes, 0
    where it is free; only: the only height and width, where they are not free; most: the largest, where each has a
    table of its own; before: latent frames that are denoised before those of the video, to make whole patches;
    least_steps: fewer its pipeline has no noise levels for. classifier_free: whether guidance takes two predictions.
    schedulers: the classes that it can be denoised by, () where that is not known. weights, vae_weights: numbers in all
    that is loaded but the VAE, and in the VAE, which stays in float32; layer_weights, largest_layer: in all layers of
    the transformers, and in the largest; encoder_weights: in the text encoders; 0 where there is no checkpoint.
    """

    layers: int
    heads: int
    head_dim: int
    latent_channels: int
    patch: tuple[int, int, int]
    vae_temporal: int
    vae_spatial: int
    max_patches: int = 1024
    multiple: int = 1
    frame_multiple: int = field(default=1, kw_only=True)
    ffn_dim: int = 0
    images: bool = False
    image: bool = False
    joint: bool = False
    beside: int = 0
    text: int = 0
    only: tuple[int, int] | None = None
    most: tuple[int, int] | None = None
    before: int = 0
    least_steps: int = 1
    classifier_free: bool = True
    schedulers: tuple[str, ...] = field(default=(), compare=False)
    weights: int = field(default=0, compare=False)
    vae_weights: int = field(default=0, compare=False)
    layer_weights: int = field(default=0, compare=False)
    largest_layer: int = field(default=0, compare=False)
    encoder_weights: int = field(default=0, compare=False)

    def latents(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The latents' shape (channels, frames, rows, columns) for a video of a legal size."""
        frames = self.before + (num_frames - 1) // self.vae_temporal + 1
        return self.latent_channels, frames, height // self.vae_spatial, width // self.vae_spatial

    def num_frames(self, frames: int) -> int:
        """Frames of the video of so many latent frames."""
        return (frames - self.before - 1) * self.vae_temporal + 1

    def tokens(self, num_frames: int, height: int, width: int) -> int:
        """Tokens of a video of a legal size."""
        return math.prod(n // p for n, p in zip(self.latents(num_frames, height, width)[1:], self.patch, strict=True))

    def length(self, num_frames: int, height: int, width: int, max_sequence_length: int) -> int:
        """Length L of the sequence that self-attention sees, for a video of a legal size."""
        text = max_sequence_length + self.beside if self.joint else 0
        return self.tokens(num_frames, height, width) + text

    def guided(self, guidance_scale: float) -> bool:
        """Whether this guidance scale takes two predictions a step, as all pipelines of diffusers have it."""
        return self.classifier_free and guidance_scale > 1

    @property
    def token_channels(self) -> int:
        """Numbers of one token as the transformer gives it out."""
        return self.latent_channels * math.prod(self.patch)

    def legal(
        self, num_frames: int, height: int, width: int, max_sequence_length: int | None = None, scheduler: str = "",
        steps: int | None = None,
    ) -> None:  # fmt: skip
        """Raises InputError naming the first size that the model cannot make, and the nearest that it can; or a
        scheduler that it is not denoised by, or too few steps."""
        if steps is not None and steps < self.least_steps:
            raise InputError(f"steps: {steps}; allowed: {self.least_steps} or more, as of this model")
        if scheduler and self.schedulers and scheduler not in self.schedulers:
            raise InputError(f"scheduler: {scheduler}; allowed: {', '.join(self.schedulers)}, as of this model")
        if self.text and max_sequence_length not in (None, self.text):
            raise InputError(f"max_sequence_length: {max_sequence_length}; allowed: {self.text}, as of this model")
        if self.images and num_frames != 1:
            raise InputError(f"num_frames: {num_frames}; allowed: 1, this is a model of images")
        token, first = self.vae_temporal * self.patch[0], self.num_frames(self.patch[0])
        step, most = math.lcm(token, self.frame_multiple), token * (self.max_patches - 1)
        _check_size("num_frames", num_frames, step, first, first + most // step * step)
        for i, (key, size) in enumerate((("height", height), ("width", width))):
            if self.only and size != self.only[i]:
                raise InputError(f"{key}: {size}; allowed: {self.only[i]}, as of this model")
            token = self.vae_spatial * self.patch[1 + i]
            step, most = math.lcm(token, self.multiple), token * self.max_patches
            _check_size(key, size, step, step, min(most, self.most[i] if self.most else most) // step * step)


@dataclass(frozen=True)
class ModelFolder:
    """A checked checkpoint.

    pipeline: the class in model_index.json, and `index` what that file says; parts: the components' configurations with
    diffusers' defaults filled in. weights: numbers in each part that has some; layers: in each layer of its
    transformers, one after the other; files: bytes of each file that counts, by its name relative to `path`;
    fingerprint: of their content, see `weights.fingerprint`.
    """

    path: Path
    family: str
    pipeline: str
    index: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    weights: dict[str, int]
    layers: list[int]
    files: dict[str, int]
    fingerprint: str

    @property
    def transformer(self) -> dict[str, Any]:
        return self.parts["transformer"]

    @property
    def vae(self) -> dict[str, Any]:
        return self.parts["vae"]

    @property
    def scheduler(self) -> str:
        """The class of the checkpoint's own."""
        return str(self.index["scheduler"][1])


def inspect(folder: Path) -> ModelFolder:
    """Checks the checkpoint in `folder`: milliseconds, also for many gigabytes.

    Raises InputError for a folder that is not in diffusers' format, of another model family, with custom
    code, with pickled weights, with a file that is missing or not whole, or with configurations that do not
    fit each other.
    """
    try:
        return _inspect(folder)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None


def shape(folder: ModelFolder) -> ModelShape:
    """The model's numbers, from its checked configurations."""
    weights, family = dict(folder.weights), families()[folder.family]
    vae = weights.pop("vae")
    found = family.shape(folder)
    return replace(
        found,
        classifier_free=family.classifier_free,
        schedulers=(*family.components["scheduler"].classes, *family.schedulers),
        weights=sum(weights.values()),
        vae_weights=vae,
        layer_weights=sum(folder.layers),
        largest_layer=max(folder.layers, default=0),
        encoder_weights=sum(weights.get(part, 0) for part in ENCODERS),
    )


def _inspect(folder: Path) -> ModelFolder:
    if not folder.is_dir():
        raise InputError(_no_folder(folder))
    path = folder / "model_index.json"
    if not path.exists() and not path.is_symlink():
        raise InputError(_no_index(folder))
    index, known = configs.read_config(path, {}), families()
    name = configs.family_of(index, known)
    family, components = known[name], configs.check_components(index, known[name])
    parts, files = dict[str, configs.Config](), [path]
    for part, component in components.items():
        parts[part] = configs.read_config(folder / part / component.config, component.defaults or {})
        if component.weights and component.library == "diffusers":
            configs.check_class(parts[part], component)
        files += (
            _tokenizer(folder / part, component.vocabulary) if component.config == TOKENIZER else [parts[part].path]
        )
    configs.check_scheduler(parts["scheduler"])
    family.check(index, parts)
    weights = {part: _weights(folder, part, c) for part, c in components.items() if c.weights}
    for part, found in weights.items():
        configs.check_tensors(parts[part], family.tensors(part, parts[part]), found.tensors)
        files += found.files
    digest = fingerprint(folder, files)  # opens each, and says what is wrong with one that it cannot
    return ModelFolder(
        path=folder,
        family=name,
        pipeline=index["_class_name"],
        index=index.values,
        parts={part: config.values for part, config in parts.items()},
        weights={part: sum(map(math.prod, found.tensors.values())) for part, found in weights.items()},
        layers=[n for part, found in weights.items() if part in TRANSFORMERS for n in _layers(family, found)],
        files={file.relative_to(folder).as_posix(): file.stat().st_size for file in files},
        fingerprint=digest,
    )


def check_loaded(folder: ModelFolder, part: str, tensors: Mapping[str, int]) -> None:
    """Raises InputError if `part`, as it was loaded, is not what its files hold.

    A tensor that the files lack would be random, and another on each rank; one that the model has no place for means
    that the configuration is of another model. tensors: the loaded ones, name to address; those at one address are one.
    """
    component = families()[folder.family].components[part]
    held = {_plain(name, component) for name in _weights(folder.path, part, component).tensors}
    loaded = {name: _plain(name, component) for name in tensors}
    there = {address for name, address in tensors.items() if loaded[name] in held}
    missing = [name for name, address in tensors.items() if loaded[name] not in held and address not in there]
    # A text encoder is part of a larger model, and its files may hold more of it.
    left = sorted(held - set(loaded.values())) if component.library == "diffusers" else []
    for names, what in ((missing, "its files lack"), (left, "its config.json has no place for")):
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise InputError(f"{folder.path / part}: {what} the tensor {names[0]}{more}; allowed: files of one model")


def _plain(name: str, component: Component) -> str:
    """A tensor's name without what transformers puts in or takes out between files and models of today."""
    if component.library == "diffusers":
        return name
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _layers(family: Family, weights: Weights) -> list[int]:
    """Numbers in each layer of a transformer."""
    lists, counts = family.layer_lists(), Counter[tuple[int, int]]()
    for name, size in weights.tensors.items():
        kind, _, rest = name.partition(".")
        if kind in lists:
            counts[lists.index(kind), int(rest.partition(".")[0])] += math.prod(size)
    return [counts[layer] for layer in sorted(counts)]


def _weights(folder: Path, part: str, component: Component) -> Weights:
    return find(folder / part, component.weights, index_first=component.library == "diffusers")


def _tokenizer(folder: Path, vocabulary: bool) -> list[Path]:
    """The tokenizer's files. Raises InputError where one is not whole, or none of them holds a `vocabulary`."""
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    files = [folder / name for name in sorted(names) if name.endswith((".json", ".model"))]
    if vocabulary and not {path.name for path in files} & {"tokenizer.json", "spiece.model", "vocab.json"}:
        raise InputError(f"{folder}: no vocabulary; allowed: a tokenizer.json or a spiece.model")
    for path in files:
        if path.suffix == ".json":
            read_json(path)
    return files


def _check_size(key: str, size: int, step: int, least: int, most: int) -> None:
    """Raises InputError unless `size` is one of least, least + step, ..., most."""
    if least <= size <= most and (size - least) % step == 0:
        return
    below = min(max(least + (size - least) // step * step, least), most)
    near = " or ".join(str(n) for n in sorted({below, min(below + step, most) if size > least else below}))
    sizes = f"{step}k + {least}" if least % step else f"multiples of {step}"
    raise InputError(
        f"{key}: {size} is a size that this model cannot make; allowed: {sizes} up to {most}; nearest: {near}"
    )


def _no_folder(folder: Path) -> str:
    if folder.exists():
        what = "is a file"
    else:
        what = "is a broken link" if folder.is_symlink() else "does not exist on this machine"
    return f"model.path: {str(folder)!r} {what}; allowed: {FORMAT}"


def _no_index(folder: Path) -> str:
    """Says where a checkpoint may be that is not in this folder itself, as in a download cache."""
    inside = sorted(folder.glob("snapshots/*/model_index.json")) or sorted(folder.glob("*/model_index.json"))
    hint = f"; did you mean {str(inside[0].parent)!r}?" if inside else ""
    return f"model.path: {str(folder)!r} has no model_index.json; allowed: {FORMAT}{hint}"

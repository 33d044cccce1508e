"""Reads what a clip of the demo model shows off its frames, without learning, and compares it with the caption.

usage: python -m tools.demo_model.judge outputs/demo

A shape counts only if it overlaps with the ideal one, of the same area at the same place, by more than three quarters
of their union, and more than with any other.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from hpcdit.output.packing import load_plugin
from tools.contact_sheet import files

from .captions import COLOURS, GROUNDS, SHAPES, Scene, Thing, parse
from .data import outline

OVERLAP = 0.75
NONE = "none"
_NEAR = 60.0  # of 442: how far from a colour a pixel may be that counts for it
_LOOKED_AT = 12  # frames of which the shape is read
_LEAST = 0.0015  # of all pixels: what is smaller than this is no thing


@dataclass(frozen=True)
class Verdict:
    """What is right in a clip. Of two things, a word is right if it is so of both; things: as many as asked for."""

    colour: bool
    shape: bool
    motion: bool
    ground: bool
    things: bool

    @property
    def all(self) -> bool:
        return all(getattr(self, field.name) for field in fields(self))


def read(frames: np.ndarray | Tensor) -> Scene:
    """What a clip, uint8 [T, H, W, 3], shows: things by the area that they cover, words "none" where unclear."""
    pixels = torch.as_tensor(frames).float()
    ground = pixels[:, ::3, ::3].reshape(-1, 3).median(0).values
    found = _colours(pixels, ground)
    masks = _masks(pixels, ground, list(found.values()))
    things = sorted(zip(masks, found, strict=True), key=lambda thing: -int(thing[0].sum()))
    seen = tuple(Thing(colour, _shape(mask), _motion(mask)) for mask, colour in things)
    return Scene(seen, _nearest(ground, GROUNDS))


def compare(wanted: Scene, seen: Scene) -> Verdict:
    """What of a wanted scene was seen. Which thing is which is decided in favour of the clip."""
    count, ground = len(seen.things) == len(wanted.things), seen.ground == wanted.ground
    if len(seen.things) < len(wanted.things):
        return Verdict(False, False, False, ground, count)
    orders = itertools.permutations(seen.things, len(wanted.things))
    verdicts = []
    for order in orders:
        colour, shape, motion = (all(a == b for a, b in zip(*w, strict=True)) for w in _words(wanted.things, order))
        verdicts.append(Verdict(colour, shape, motion, ground, count))
    return max(verdicts, key=lambda verdict: (verdict.colour, verdict.shape + verdict.motion))


def _words(*rows: Sequence[Thing]) -> list[list[list[str]]]:
    return [[[getattr(thing, word) for thing in row] for row in rows] for word in ("colour", "shape", "motion")]


def _nearest(rgb: Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    distance = torch.linalg.vector_norm(rgb - torch.tensor(list(palette.values()), device=rgb.device), dim=-1)
    return list(palette)[int(distance.argmin())] if float(distance.min()) < _NEAR else NONE


def _colours(pixels: Tensor, ground: Tensor) -> dict[str, Tensor]:
    """The colours that cover areas, not edges alone, each with its RGB in this clip."""
    palette = torch.tensor(list(COLOURS.values()), device=pixels.device).float()
    near, kind = torch.cdist(pixels.reshape(-1, 3), torch.cat([ground[None], palette])).min(-1)
    kind = torch.where(near < _NEAR, kind, 0).reshape(pixels.shape[:3])
    core = kind[:, 1:-1, 1:-1].clone()
    for rows, columns in ((slice(2, None), slice(1, -1)), (slice(-2), slice(1, -1)),
                          (slice(1, -1), slice(2, None)), (slice(1, -1), slice(-2))):  # fmt: skip
        core[core != kind[:, rows, columns]] = 0
    areas = core.flatten().bincount(minlength=len(COLOURS) + 1)[1:]
    least = max(_LEAST * kind.numel(), 0.04 * float(areas.max()))
    inner = pixels[:, 1:-1, 1:-1]
    return {
        name: inner[core == i].median(0).values for i, name in enumerate(COLOURS, 1) if float(areas[i - 1]) >= least
    }


def _masks(pixels: Tensor, ground: Tensor, colours: Sequence[Tensor]) -> list[Tensor]:
    """Where each colour covers a pixel by half or more, bool [T, H, W] each.

    A pixel is a mixture of the ground and one of the colours: that one on whose way from the ground it lies nearest.
    """
    if not colours:
        return []
    ways = torch.stack([colour - ground for colour in colours])
    off = pixels - ground
    cover = torch.einsum("thwc,nc->nthw", off, ways) / ways.square().sum(1)[:, None, None, None]
    nearest = torch.stack(
        [(off - c.clamp(0, 1)[..., None] * way).square().sum(-1) for c, way in zip(cover, ways, strict=True)]
    ).argmin(0)
    return [(nearest == i) & (c > 0.5) for i, c in enumerate(cover)]


def _shape(mask: Tensor) -> str:
    """The shape that a thing has in half of the frames or more."""
    frames = mask[torch.linspace(0, len(mask) - 1, min(_LOOKED_AT, len(mask))).round().long()]
    overlaps = torch.stack([overlap(frames, shape) for shape in SHAPES]).median(1).values
    best = int(overlaps.argmax())
    return SHAPES[best] if float(overlaps[best]) > OVERLAP else NONE


def overlap(mask: Tensor, shape: str) -> Tensor:
    """Intersection over union of each frame's mask, bool [T, H, W], with a shape of the same area and centroid: [T]."""
    area, x, y = _moments(mask)
    share, down = _ideal(shape)
    size = (area / share).sqrt().clamp(min=1.0)[:, None, None]
    columns, rows = _grid(mask)
    ideal = outline(shape, columns - x[:, None, None], rows - y[:, None, None] + down * size, size) < 0
    return (mask & ideal).sum((1, 2)) / (mask | ideal).sum((1, 2)).clamp(min=1)


@cache
def _ideal(shape: str) -> tuple[float, float]:
    """A shape's area, and how far its centroid is below its centre, at size 1."""
    size = 100.0
    mask = torch.zeros(1, 300, 300, dtype=torch.bool)
    columns, rows = _grid(mask)
    mask = outline(shape, columns - 150, rows - 150, torch.tensor(size)).expand_as(mask) < 0
    area, _, y = _moments(mask)
    return float(area) / size**2, (float(y) - 150) / size


def _grid(mask: Tensor) -> tuple[Tensor, Tensor]:
    _, height, width = mask.shape
    return torch.arange(width, device=mask.device) + 0.5, torch.arange(height, device=mask.device)[:, None] + 0.5


def _moments(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area and centroid (x, y) in pixels of each frame's mask, each [T]."""
    columns, rows = _grid(mask)
    area = mask.sum((1, 2)).float()
    x, y = ((mask * places).sum((1, 2)) / area.clamp(min=1) for places in (columns, rows))
    return area, x, y


def _motion(mask: Tensor) -> str:
    """How a thing moves, if it does so steadily, is there all the time and does nothing else besides."""
    area, x, y = _moments(mask)
    side = min(mask.shape[1:])
    if float((area > 20).float().mean()) < 0.9 or float(min(area[0], area[-1])) <= 20:
        return NONE
    (left, right, off_x), (top, bottom, off_y), (small, large, _) = (_line(values) for values in (x, y, area.sqrt()))
    if max(off_x, off_y) > 0.04 * side:
        return NONE
    across, down = (right - left) / side, (bottom - top) / side
    least, most = sorted((abs(across), abs(down)))
    growth = large / max(small, 1.0)
    if growth > 1.4 and most < 0.1:
        return "growing"
    if not 0.75 < growth < 1.35:
        return NONE
    if most < 0.08:
        return "standing still"
    if most < 0.15 or least > 0.35 * most:
        return NONE
    if abs(across) > abs(down):
        return "moving right" if across > 0 else "moving left"
    return "moving down" if down > 0 else "moving up"


def _line(values: Tensor) -> tuple[float, float, float]:
    """First and last value of the straight line through values, and how far from it they are (root mean square)."""
    time = torch.linspace(-1, 1, len(values), device=values.device)
    middle, slope = values.mean(), (values * time).sum() / time.square().sum()
    off = (values - middle - slope * time).square().mean().sqrt()
    return float(middle - slope), float(middle + slope), float(off)


@dataclass(frozen=True)
class Case:
    """A clip that was judged."""

    name: str
    wanted: Scene
    seen: Scene
    size: tuple[int, ...]

    @property
    def verdict(self) -> Verdict:
        return compare(self.wanted, self.seen)

    @property
    def groups(self) -> list[str]:
        """The lines of the table that it counts for."""
        frames, height, width = self.size
        words = {f"{thing.shape} on {self.wanted.ground}" for thing in self.wanted.things}
        words |= {thing.shape for thing in self.wanted.things} | {f"on {self.wanted.ground}"}
        return ["all", ("one thing", "two things")[len(self.wanted.things) - 1], f"{frames}x{height}x{width}", *words]


def judge(path: Path) -> Case:
    """Judges a video of hpcdit. Raises ValueError naming the file if it is none, or its prompt no caption."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            load_plugin(file["frames"])
            prompt, frames = file.attrs["prompt"], file["frames"][:]
    except FileNotFoundError:
        raise
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: not a video of hpcdit ({error})") from error
    try:
        return Case(path.stem, parse(prompt), read(frames), frames.shape[:3])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def table(cases: Sequence[Case]) -> str:
    """Percentages right, by group and attribute, and below it what was wrong."""
    columns = [field.name for field in fields(Verdict)] + ["all"]
    groups: dict[str, list[Verdict]] = {}
    for case in cases:
        for group in case.groups:
            groups.setdefault(group, []).append(case.verdict)
    order = ["all", "one thing", "two things", *SHAPES, *(f"on {ground}" for ground in GROUNDS)]
    order += [f"{shape} on {ground}" for shape in SHAPES for ground in GROUNDS]
    order += sorted(group for group in groups if group not in order)
    lines = [f"{'':18}{'clips':>7}" + "".join(f"{column:>9}" for column in columns)]
    for group in (group for group in order if group in groups):
        verdicts = groups[group]
        shares = [sum(getattr(verdict, column) for verdict in verdicts) / len(verdicts) for column in columns]
        lines.append(f"{group:18}{len(verdicts):7}" + "".join(f"{100 * share:9.1f}" for share in shares))
    wrong = [f"{case.name}: {case.wanted}; seen: {case.seen}" for case in cases if not case.verdict.all]
    return "\n".join([*lines, *(["", "wrong:", *wrong] if wrong else [])])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Percentages of what videos of the demo model show as asked.")
    parser.add_argument("videos", nargs="+", type=Path, help="output folders of runs, or video files (.h5)")
    arguments = parser.parse_args(words)
    try:
        print(table([judge(path) for place in arguments.videos for path in files(place)]))
    except (OSError, ValueError) as error:
        print("judge:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Clips of coloured shapes that move, made on any device as fast as they are wanted.

Scenes travel as rows of seven numbers: (colour, shape, motion) of the first and of the second thing (-1 each where
there is none) and the ground, each an index into the words of `captions`.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .captions import COLOURS, GROUNDS, MOTIONS, SHAPES, Scene

_COLOURS, _GROUNDS = tuple(COLOURS), tuple(GROUNDS)
_STAR = 0.42  # inner radius of a star over the outer one
REACH = 1.25  # the farthest point of any shape from its centre, in sizes
# Of the smaller side of the frames. Two things share it, and are smaller.
_STILL, _SMALL, _LARGE = (0.125, 0.18), (0.083, 0.115), (0.22, 0.27)
_OF_TWO = 0.72
_TRAVEL = (0.29, 0.46)  # of the side along which a thing moves
_MARGIN = 2.0  # pixels that stay free at the border, and between two things
_TRIES = 32  # layouts drawn for a clip of two things, of which the first is taken where neither hides the other


@dataclass(frozen=True)
class Size:
    """A clip's: frames, and pixels of height and width."""

    frames: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.frames * self.height * self.width


def encode(scenes: Iterable[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes as numbers, int64 [B, 7]."""
    rows = []
    for scene in scenes:
        row = [-1] * 6
        for i, thing in enumerate(scene.things):
            words = _COLOURS.index(thing.colour), SHAPES.index(thing.shape), MOTIONS.index(thing.motion)
            row[3 * i : 3 * i + 3] = words
        rows.append([*row, _GROUNDS.index(scene.ground)])
    return torch.tensor(rows, device=device)


def outline(shape: str, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Signed distance in pixels from a shape's outline, negative inside.

    x, y: from its centre, y downwards; size: a circle's radius, and of the others what looks as large. All broadcast
    against each other. Raises KeyError for a shape that is none of SHAPES.
    """
    return _OUTLINES[shape](x, y, size)


def _circle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.hypot(x, y) - size


def _square(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.88 * size


def _triangle(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Three half planes; upright, and centred on its bounding box."""
    reach = REACH * size
    low = y - 0.25 * reach
    return torch.maximum(low, 0.75**0.5 * x.abs() - 0.5 * low) - 0.5 * reach


def _star(x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Of five points: all ten edges are mirror images of one, from a tip to the next inner corner."""
    reach = REACH * size
    x, y = x.abs(), -y
    c, s = 0.8090169943749475, 0.5877852522924731  # of 36 degrees
    for side in (1.0, -1.0):
        beyond = 2 * torch.clamp(side * c * x - s * y, min=0)
        x, y = x - side * c * beyond, y + s * beyond
    x, y = x.abs(), y - reach
    edge_x, edge_y = _STAR * s, _STAR * c - 1
    along = torch.minimum(((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(min=0), reach)
    off = torch.hypot(x - edge_x * along, y - edge_y * along)
    return off * torch.sign(y * edge_x - x * edge_y)


_OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star}


_ALL = slice(None)


def draw(scenes: Tensor, size: Size, generator: torch.Generator, rows: slice = _ALL) -> Tensor:
    """A clip of each scene, float32 [B, 3, frames, height, width] in [-1, 1], channels last in memory.

    scenes: as `encode` makes them; rows: those of them that are wanted, which are what they would be among all.
    Everything that a caption leaves open comes from the generator, which is on the scenes' device. No thing leaves the
    frames; where it can be had, neither of two hides the other.
    """
    x, y, reach = (places[rows] for places in layout(scenes, size, generator))
    return paint(scenes[rows], size, x, y, reach / REACH)


def layout(scenes: Tensor, size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Where things are: x, y of the centre and the reach, in pixels, each [B, 2, frames]."""
    two = scenes[:, 3] >= 0
    tries = _TRIES if bool(two.any()) else 1
    x, y, reach = _tracks(scenes, size, tries, generator)
    apart = torch.hypot(x[:, :, 0] - x[:, :, 1], y[:, :, 0] - y[:, :, 1]) - reach.sum(2)
    room = torch.where(two[:, None], apart.amin(2), torch.inf)
    clear = room >= _MARGIN
    best = torch.where(clear.any(1), clear.int().argmax(1), room.argmax(1))
    rows = torch.arange(len(scenes), device=scenes.device)
    return x[rows, best], y[rows, best], reach[rows, best]


def _tracks(scenes: Tensor, size: Size, tries: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As many layouts as there are tries: x, y, reach, each [B, tries, 2, frames]."""
    device, shape = scenes.device, (len(scenes), tries, 2)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=device, generator=generator)

    motion = scenes[:, None, 2:6:3].expand(shape)
    scale = min(size.height, size.width) * torch.where(scenes[:, 3] >= 0, _OF_TWO, 1.0)[:, None, None]
    growing = motion == MOTIONS.index("growing")
    still, small, large = between(*_STILL), between(*_SMALL), between(*_LARGE)
    first = REACH * scale * torch.where(growing, small, still)
    last = REACH * scale * torch.where(growing, large, still)
    border = torch.maximum(first, last) + _MARGIN
    time = torch.linspace(0, 1, size.frames, device=device)
    travel, centres = between(*_TRAVEL), []
    for side, back, forth in ((size.width, 0, 1), (size.height, 2, 3)):
        sign = (motion == forth).float() - (motion == back).float()
        half = sign * torch.minimum(travel * side, side - 2 * border) / 2
        least = border + half.abs()
        middle = least + between(0, 1) * (side - 2 * least)
        centres.append(middle[..., None] + half[..., None] * (2 * time - 1))
    return centres[0], centres[1], first[..., None] + (last - first)[..., None] * time


def paint(scenes: Tensor, size: Size, x: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
    """Frames of things at given places, as `draw` returns them; x, y, sizes: pixels, each [B, 2, frames]."""
    device = scenes.device
    colours, grounds = (torch.tensor(list(rgb.values()), device=device) / 127.5 - 1 for rgb in (COLOURS, GROUNDS))
    columns = torch.arange(size.width, device=device) + 0.5
    lines = torch.arange(size.height, device=device)[:, None] + 0.5
    clips = grounds[scenes[:, 6]][:, None, None, None].repeat(1, size.frames, size.height, size.width, 1)
    for i, (kind, shape) in itertools.product(range(2), enumerate(SHAPES)):
        rows = (scenes[:, 3 * i + 1] == kind).nonzero()[:, 0]
        if len(rows):
            right, down = (place[rows, i, :, None, None] for place in (x, y))
            distance = outline(shape, columns - right, lines - down, sizes[rows, i, :, None, None])
            cover = (0.5 - distance).clamp_(0, 1)[..., None]
            clips[rows] = clips[rows].lerp(colours[scenes[rows, 3 * i]][:, None, None, None], cover)
    return clips.permute(0, 4, 1, 2, 3)


def frames(clips: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1] as pictures: uint8 [B, T, H, W, 3]."""
    return ((clips.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def first_frame(scene: Scene, seed: int, side: int = 96) -> np.ndarray:
    """A picture that a clip of the scene starts with, uint8 [side, side, 3]."""
    clips = draw(encode([scene]), Size(33, side, side), torch.Generator().manual_seed(seed))
    return frames(clips)[0, 0].numpy()

"""What is learned from: scenes that training may see, and a bank of their clips' latents."""

import hashlib
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import whole
from .captions import Scene, held_out, scenes
from .data import Size, draw, encode
from .ranks import Ranks

_PIXELS = 96 * 33 * 96 * 96  # of clips that the VAE encodes at a time


def drawn_from(*what: object) -> int:
    """A seed that depends on all that is named, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:7])


def generator(device: torch.device, *what: object) -> torch.Generator:
    return torch.Generator(device).manual_seed(drawn_from(*what))


def choice(sizes: dict[Size, float], *what: object) -> Size:
    """One of the sizes, the likelier the larger its weight."""
    return random.Random(drawn_from(*what)).choices(list(sizes), list(sizes.values()))[0]


@cache
def seen(things: int) -> tuple[list[Scene], Tensor]:
    """The scenes that training may see, and the same as numbers, int64 [N, 7]."""
    rows = [scene for scene in scenes(things) if not held_out(scene)]
    return rows, encode(rows)


class Scenes:
    """All scenes that training may see. rows: int64 [N, 7]; captions: N of them."""

    def __init__(self, two: float, emphasis: dict[str, float], device: torch.device) -> None:
        kinds = [seen(things) for things in ((1, 2) if two else (1,))]
        weights = []
        for (kind, _), share in zip(kinds, (1 - two, two), strict=False):
            raw = [
                emphasis.get(scene.ground, 1.0) * max(emphasis.get(thing.shape, 1.0) for thing in scene.things)
                for scene in kind
            ]
            whole_weight = sum(raw)
            weights += [weight * share / whole_weight for weight in raw]
        self.captions = [str(scene) for kind, _ in kinds for scene in kind]
        self.rows = torch.cat([rows for _, rows in kinds]).to(device)
        self._weights = torch.tensor(weights, device=device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of scenes, int64 [count]."""
        return torch.multinomial(self._weights, count, replacement=True, generator=generator)


class Bank:
    """Normalised latents of clips, made anew every so many steps; the same whoever asks, in whatever order.

    mean, std: of the VAE's latents, float32 [z]. With images, also the latents of clips of which all but the first
    frame is grey: what an image-to-video pipeline is given.
    """

    def __init__(self, vae: Any, mean: Tensor, std: Tensor, scenes: Scenes, sizes: dict[Size, float], clips: int,
                 steps: int, seed: int, images: bool, autocast: bool, ranks: Ranks) -> None:  # fmt: skip
        self._vae, self._scenes, self._sizes, self._clips = vae, scenes, sizes, clips
        self._mean, self._std = (values.view(1, -1, 1, 1, 1) for values in (mean, std))
        self._steps, self._seed, self._images, self._autocast, self._ranks = steps, seed, images, autocast, ranks
        self._made = -1
        self._latents: dict[Size, tuple[Tensor, Tensor | None, Tensor]] = {}

    def batch(self, step: int, size: Size, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, z, t, h, w], what a pipeline gives beside them [B, 0 or 4 + z, t, h, w], and scenes [B]."""
        if step // self._steps != self._made:
            self._made = step // self._steps
            # Trying out kernels for every size takes longer than all that these few batches could save.
            benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
            self._latents = {size: self._fill(size) for size in self._sizes}
            torch.backends.cudnn.benchmark = benchmark
        latents, images, which = self._latents[size]
        rows = torch.randint(len(which), (count,), device=which.device, generator=generator)
        x = latents[rows].float()
        if images is None:
            return x, x[:, :0], which[rows]
        return x, condition(images[rows].float()), which[rows]

    @torch.no_grad()
    def _fill(self, size: Size) -> tuple[Tensor, Tensor | None, Tensor]:
        device = self._mean.device
        source = generator(device, self._seed, "bank", self._made, size)
        share = self._sizes[size] / sum(self._sizes.values())
        count = max(round(self._clips * share), 1)
        batch = min(max(1, _PIXELS // size.pixels), count)
        if batch < self._ranks.size:
            raise ValueError(f"bank.clips: {count} clips of {size}; allowed: one or more for every rank")
        which = self._scenes.draw(-(-count // batch) * batch, source)  # batches of one size: kernels are chosen once
        mine, latents, images = self._ranks.rows(batch), [], []
        for rows in which.split(batch):
            clips = draw(self._scenes.rows[rows], size, source, mine)
            latents.append(self._encode(clips))
            if self._images:
                images.append(self._encode(first_only(clips)))
        return self._all(latents, batch), self._all(images, batch) if images else None, which

    def _all(self, parts: list[Tensor], batch: int) -> Tensor:
        """All ranks' rows of all batches, of which this rank has `parts`."""
        made = parts[0].new_zeros(len(parts), batch, *parts[0].shape[1:])
        made[:, self._ranks.rows(batch)] = torch.stack(parts)
        return self._ranks.sum(made).flatten(0, 1)

    def _encode(self, clips: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self._autocast):
            mean, _ = whole.encode(self._vae, clips)
        normal = (mean.float() - self._mean) / self._std
        return normal.to(torch.bfloat16 if self._autocast else torch.float32)


def first_only(clips: Tensor) -> Tensor:
    """Clips of which all frames but the first are 0, grey."""
    return torch.cat([clips[:, :, :1], torch.zeros_like(clips[:, :, 1:])], 2)


def condition(images: Tensor) -> Tensor:
    """What WanImageToVideoPipeline puts beside latents: four channels that say which frames are given, and `images`."""
    mask = torch.zeros_like(images[:, :1]).repeat(1, 4, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, images], 1)


@torch.no_grad()
def statistics(vae: Any, scenes: Scenes, size: Size, clips: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, float32 [z]."""
    source = generator(scenes.rows.device, seed, "statistics")
    parts = [
        whole.encode(vae, draw(scenes.rows[rows], size, source))[0].float()
        for rows in scenes.draw(clips, source).split(64)
    ]
    latents = torch.cat(parts).transpose(0, 1).flatten(1)
    return latents.mean(1), latents.std(1)

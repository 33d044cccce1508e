"""The demo model's captions: what they can say, and which of them no training sees.

usage: python -m tools.demo_model.captions --things 1 --seeds 4 -o held-out.jsonl     (a prompts file of hpcdit)
       ... --pictures     for the model that starts from pictures (model=demo-image)
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# RGB, 0 to 255.
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 215, 40),
    "orange": (245, 130, 25),
    "purple": (140, 50, 180),
    "cyan": (40, 205, 215),
    "pink": (250, 130, 190),
}
GROUNDS = {"white": (245, 245, 245), "black": (10, 10, 10), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "standing still", "growing")
_SALT = 1140  # makes every shape on every ground part of what is held out
FORM = "a COLOUR SHAPE MOTION [and a COLOUR SHAPE MOTION] on GROUND"


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for, or what was seen in a clip: there a word may be "none"."""

    things: tuple[Thing, ...]
    ground: str

    def __str__(self) -> str:
        return f"{' and '.join(map(str, self.things)) or 'nothing'} on {self.ground}"


def parse(caption: str) -> Scene:
    """The scene of a caption. Raises ValueError for any other text."""
    colour, shape, motion = (f"({'|'.join(words)})" for words in (COLOURS, SHAPES, MOTIONS))
    thing = f"an? {colour} {shape} {motion}"
    match = re.fullmatch(f"{thing}(?: and {thing})? on ({'|'.join(GROUNDS)})", " ".join(caption.lower().split()))
    if match is None:
        raise ValueError(f"{caption!r} is no caption of the demo model; allowed: {FORM}")
    *words, ground = match.groups()
    return Scene(tuple(Thing(*words[i : i + 3]) for i in (0, 3) if words[i] is not None), ground)


@cache
def scenes(things: int) -> tuple[Scene, ...]:
    """All scenes of one thing (576) or of two in different colours (96,768, both orders)."""
    one = [Thing(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS)]
    rows = [row for row in itertools.product(one, repeat=things) if len({thing.colour for thing in row}) == things]
    return tuple(Scene(row, ground) for row in rows for ground in GROUNDS)


def held_out(scene: Scene) -> bool:
    """Whether no training may see the scene: a tenth of those of one thing, told by a hash of the words alone.

    Of those with two things a tenth, too, whichever is named first, and all that have a held-out one in them.
    """
    things = sorted(map(str, scene.things))
    parts = things if len(things) == 1 else [*things, " and ".join(things)]
    return any(_held_out(f"{part} on {scene.ground}") for part in parts)


@cache
def _held_out(words: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"{_SALT}: {words}".encode()).digest()[:8]) < 2**64 // 10


def examples(things: int, count: int | None = None) -> list[Scene]:
    """Held-out scenes, all of them or `count`, the same ones each time and all kinds alike."""
    if count == 0:
        return []
    rows = [scene for scene in scenes(things) if held_out(scene)]
    if count is None:
        return rows
    return sorted(rows, key=lambda scene: hashlib.sha256(f"example: {scene}".encode()).digest())[:count]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes held-out captions of the demo model as a prompts file.")
    parser.add_argument("--things", type=int, choices=(1, 2), default=1, help="in each caption, default: %(default)s")
    parser.add_argument("--count", type=int, help="captions, default: all that are held out")
    parser.add_argument("--seeds", type=int, default=1, help="videos of each caption, default: %(default)s")
    parser.add_argument("--pictures", action="store_true", help="also a picture to start from for each video, of 96x96")
    parser.add_argument("-o", "--output", type=Path, default=Path("held-out.jsonl"), help="default: %(default)s")
    arguments = parser.parse_args(words)
    asked = examples(arguments.things, arguments.count)
    lines: list[dict[str, object]] = [
        {"prompt": str(scene), "id": f"{i:04}-{seed}", "seed": 1000 * seed + i}
        for i, scene in enumerate(asked)
        for seed in range(arguments.seeds)
    ]
    try:
        if arguments.pictures:
            _pictures(lines, arguments.output)
        arguments.output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    except OSError as error:
        print(f"captions: {arguments.output}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {len(lines)} videos")
    return 0


def _pictures(lines: Sequence[dict[str, object]], beside: Path) -> None:
    """The first frame of a clip of each line's caption, in a folder beside the prompts file, and in the line."""
    from PIL import Image

    from .data import first_frame

    folder = beside.with_name(f"{beside.stem}-pictures")
    folder.mkdir(parents=True, exist_ok=True)
    for line in lines:
        picture = Image.fromarray(first_frame(parse(str(line["prompt"])), int(str(line["seed"]))))
        picture.save(folder / f"{line['id']}.png")
        line["image"] = f"{folder.name}/{line['id']}.png"


if __name__ == "__main__":
    sys.exit(main())

"""The judge of the demo model: right on real clips of every kind, also on blurred and noisy ones, not on wrong ones."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hpcdit.output.packing import WAYS
from tools.demo_model import captions, judge
from tools.demo_model.captions import COLOURS, GROUNDS, MOTIONS, SHAPES, Scene, Thing, examples, held_out, parse, scenes
from tools.demo_model.data import Size, draw, encode, frames, layout, paint
from tools.demo_model.judge import Verdict, compare, overlap, read

SMALL = Size(17, 96, 96)
FIRST = ["a blue square growing on grey", "a blue triangle moving up on white"]
RED = Thing("red", "star", "moving left")
BLUE = Thing("blue", "square", "moving up")


pytestmark = pytest.mark.usefixtures("one_thread")


def clips(wanted: Sequence[Scene], size: Size = SMALL, seed: int = 0) -> Tensor:
    return frames(draw(encode(wanted), size, torch.Generator().manual_seed(seed)))


def worn(clip: Tensor) -> Tensor:
    """As a VAE may give it back: blurred by .7 of a pixel, with noise of 5 levels."""
    pixels = clip.float().permute(0, 3, 1, 2)
    line = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * 0.7**2))
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 5, 5)
    blurred = functional.conv2d(functional.pad(pixels, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    noise = 5 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (blurred + noise).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [Size(33, 96, 96), Size(17, 96, 160), Size(17, 128, 128)], ids=str)
@pytest.mark.parametrize("things", [1, 2])
def test_it_reads_what_real_clips_show(things: int, size: Size) -> None:
    wanted = scenes(things)[things :: len(scenes(things)) // 12]
    for scene, clip in zip(wanted, clips(wanted, size), strict=True):
        assert compare(scene, read(clip)).all, (str(scene), str(read(clip)))
        assert compare(scene, read(worn(clip))).all, (str(scene), str(read(worn(clip))))


@pytest.mark.parametrize("ground", GROUNDS)
def test_it_knows_every_word(ground: str) -> None:
    words = [(c, SHAPES[i % 4], MOTIONS[i % 6]) for i, c in enumerate(COLOURS)]
    wanted = [Scene((Thing(*row),), ground) for row in words]
    assert [read(clip) for clip in clips(wanted)] == wanted


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (replace(RED, colour="orange"), "colour"),
        (replace(RED, shape="circle"), "shape"),
        (replace(RED, motion="moving right"), "motion"),
        (replace(RED, motion="growing"), "motion"),
    ],
)
def test_one_wrong_word_is_one_wrong_attribute(shown: Thing, wrong: str) -> None:
    wanted = Scene((RED, BLUE), "grey")
    verdict = compare(wanted, read(clips([Scene((BLUE, shown), "grey")])[0]))
    assert verdict == replace(Verdict(True, True, True, True, True), **{wrong: False})


def test_a_wrong_ground_a_missing_thing_and_one_too_many() -> None:
    one, two = Scene((RED,), "white"), Scene((RED, BLUE), "white")
    shown_one, shown_two = clips([one])[0], clips([two])[0]
    assert compare(Scene((RED,), "grey"), read(shown_one)) == Verdict(True, True, True, False, True)
    assert compare(one, read(shown_two)) == Verdict(True, True, True, True, False)
    assert compare(two, read(shown_one)) == Verdict(False, False, False, True, False)


def test_words_of_two_things_that_were_mixed_up_are_wrong() -> None:
    wanted = Scene((RED, BLUE), "black")
    mixed = Scene((replace(RED, shape=BLUE.shape), replace(BLUE, shape=RED.shape)), "black")
    assert compare(wanted, mixed) == Verdict(True, False, True, True, True)


def test_nothing_is_nothing() -> None:
    empty = torch.full((17, 96, 96, 3), 128, dtype=torch.uint8)
    assert read(empty) == Scene((), "grey")
    assert (
        read(torch.randint(256, empty.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)).things
        == ()
    )
    assert read(torch.full_like(empty, 190)).ground == "none"


def test_a_ragged_blob_is_no_star() -> None:
    """One with as much area missing from its hull as a star's, and as many tips."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    for _ in range(20):
        tips = torch.rand(5, 2, generator=generator)
        edge = 9 + sum(
            14 * torch.exp(-((torch.remainder(angle - 6.3 * at + 3.14, 6.28) - 3.14) ** 2) / 0.05) for at, _ in tips
        )
        mask = (radius < edge).expand(17, -1, -1)
        assert float(overlap(mask, "star").median()) < judge.OVERLAP


def test_a_rectangle_is_no_square_and_an_ellipse_no_circle() -> None:
    y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")
    bar, ellipse = (x.abs() < 20) & (y.abs() < 9), (x / 24) ** 2 + (y / 10) ** 2 < 1
    for shape in SHAPES:
        assert float(overlap(bar.expand(2, -1, -1), shape)[0]) < judge.OVERLAP
        assert float(overlap(ellipse.expand(2, -1, -1), shape)[0]) < judge.OVERLAP


def test_a_thing_that_jumps_or_is_away_does_not_move() -> None:
    scene = Scene((replace(RED, motion="standing still"),), "black")
    clip = clips([scene], Size(32, 96, 96))[0]
    for away in (slice(8), slice(10, 18), slice(24, None)):
        late = clip.clone()
        late[away] = clip[0, 0, 0]
        assert read(late).things[0].motion == "none"
    jumping = clip.clone()
    jumping[::2] = clip[::2].roll(40, 2)
    assert read(jumping).things[0].motion == "none"


def test_things_stay_inside_and_clear_of_each_other() -> None:
    wanted = examples(2, 100)
    x, y, reach = layout(encode(wanted), Size(33, 96, 160), torch.Generator().manual_seed(3))
    apart = torch.hypot(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]) - reach.sum(1)
    assert float(apart.amin()) > 0
    assert float((x - reach).amin()) > 0 and float((x + reach).amax()) < 160
    assert float((y - reach).amin()) > 0 and float((y + reach).amax()) < 96


def test_edges_are_smooth_and_areas_exact() -> None:
    scene = encode([Scene((Thing("red", "circle", "standing still"),), "black")])
    at, size = torch.full((1, 2, 1), 48.3), torch.full((1, 2, 1), 20.0)
    clip = paint(scene, Size(1, 96, 96), at, at, size)
    red = (clip[0, 0] + 1) * 127.5
    assert len(red.unique()) > 20
    assert float((red - 10).sum() / 210) == pytest.approx(3.14159 * 20**2, rel=0.003)


def test_the_split_is_fixed_and_two_things_give_no_held_out_one_away() -> None:
    assert len(examples(1)) == 59
    assert [str(scene) for scene in examples(1, 2)] == FIRST
    kinds = {(scene.things[0].shape, scene.ground) for scene in examples(1)}
    assert len(kinds) == len(SHAPES) * len(GROUNDS)
    for scene in scenes(2)[::97]:
        if not held_out(scene):
            assert not any(held_out(Scene((thing,), scene.ground)) for thing in scene.things)
        assert held_out(scene) == held_out(Scene(scene.things[::-1], scene.ground))


def test_pictures_to_start_from_show_what_their_captions_say(tmp_path: Path) -> None:
    words = "--pictures", "--things", "2", "--count", "3", "--seeds", "2", "-o", str(tmp_path / "x.jsonl")
    assert captions.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(tmp_path / line["image"])) for line in lines]
    assert len(lines) == 6 and len({picture.tobytes() for picture in pictures}) == 6
    for line, picture in zip(lines, pictures, strict=True):
        wanted = parse(line["prompt"])
        still = replace(wanted, things=tuple(replace(thing, motion="standing still") for thing in wanted.things))
        assert picture.shape == (96, 96, 3) and compare(still, read(torch.tensor(picture).expand(9, -1, -1, -1))).all


def test_captions_are_read_back() -> None:
    for scene in [*scenes(1)[::31], *scenes(2)[::9973]]:
        assert parse(str(scene)) == scene
    assert parse("An  orange star growing on White") == Scene((Thing("orange", "star", "growing"),), "white")
    for text in ("", "a red circle on black", "a red circle growing on black.", "two red circles growing on black"):
        with pytest.raises(ValueError, match="allowed: a COLOUR SHAPE MOTION"):
            parse(text)


def write(path: Path, prompt: str, clip: Tensor, **packing: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["prompt"] = prompt
        file.create_dataset("frames", data=clip.numpy(), **packing)


def test_the_table_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = Scene((RED,), "white"), Scene((BLUE,), "black")
    shown = clips([right, replace(wrong, ground="grey")])
    write(tmp_path / "videos" / "a.h5", str(right), shown[0])
    write(tmp_path / "videos" / "b.h5", str(wrong), shown[1])
    assert judge.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in lines}
    assert lines[0].split() == ["clips", "colour", "shape", "motion", "ground", "things", "all"]
    assert rows["all"] == ["2", "100.0", "100.0", "100.0", "50.0", "100.0", "50.0"]
    assert rows["star"][-1] == "100.0" and rows["square"][-1] == "0.0" and rows["star on white"][0] == "1"
    assert lines[-1] == f"b: {wrong}; seen: a blue square moving up on grey"


def test_what_cannot_be_judged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "videos" / "a.h5", "a cat", clips([Scene((RED,), "white")])[0])
    assert judge.main([str(tmp_path)]) == 2
    assert "a.h5: 'a cat' is no caption of the demo model" in capsys.readouterr().err
    (tmp_path / "videos" / "a.h5").write_bytes(b"none")
    assert judge.main([str(tmp_path)]) == 2
    assert "a.h5: not a video of hpcdit" in capsys.readouterr().err


def test_frames_that_a_plugin_unpacks_are_judged_in_a_process_that_has_not_loaded_it(tmp_path: Path) -> None:
    pytest.importorskip("hdf5plugin")
    scene = Scene((RED,), "white")
    write(tmp_path / "a.h5", str(scene), clips([scene])[0], chunks=True, **WAYS["zstd"])
    words = [sys.executable, "-m", "tools.demo_model.judge", "a.h5"]
    path = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and "100.0" in done.stdout, done.stderr

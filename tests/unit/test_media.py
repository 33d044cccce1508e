"""MP4 files that show the frames, and contact sheets that a person can read."""

import errno
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFont

from hpcdit.output import media, store
from tests.unit.test_store import EVENTS, RECORD

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "contact_sheet.py"
RED, GREEN = (200, 30, 40), (20, 180, 90)


def clip(count: int, height: int, width: int) -> np.ndarray:
    """A red field into which green comes from the left, frame by frame."""
    frames = np.full((count, height, width, 3), RED, np.uint8)
    for i, frame in enumerate(frames):
        frame[:, : (i + 1) * width // (count + 1)] = GREEN
    return frames


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def far(seen: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(seen.astype(int) - wanted).mean())


@pytest.mark.parametrize(("height", "width"), [(96, 64), (48, 81), (33, 31)])
def test_a_video_shows_its_frames_in_their_colours(height: int, width: int, tmp_path: Path) -> None:
    frames, path = clip(5, height, width), tmp_path / "a.mp4"
    media.write_mp4(path, frames, 16)
    seen = decoded(path)
    assert seen.shape == (5, height + height % 2, width + width % 2, 3)
    assert far(seen[:, :height, :width], frames) < 6
    assert far(seen[:, -1, -1], np.array(RED)) < 6, "the padding continues the picture"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_video_is_h264_for_every_player(tmp_path: Path) -> None:
    media.write_mp4(tmp_path / "a.mp4", clip(2, 64, 64), 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1), "BT.709, 16 to 235"


@pytest.mark.parametrize("fps", [1, 16, 23.976, 60])
def test_a_video_lasts_as_long_as_its_frames(fps: float, tmp_path: Path) -> None:
    media.write_mp4(tmp_path / "a.mp4", clip(7, 32, 32), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate and float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        assert stream.duration and stream.time_base
        assert float(stream.duration * stream.time_base) == pytest.approx(7 / fps, abs=1e-3)


def test_without_x264_there_is_a_video_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    frames = clip(5, 64, 64)
    media.write_mp4(tmp_path / "a.mp4", frames, 16)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert far(decoded(tmp_path / "a.mp4"), frames) < 5


NO_GPU = 99  # on no machine; what has an encoder fails to find this one


def codec(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.name


def test_without_a_gpu_that_encodes_the_cpu_does_and_the_reason_is_told(tmp_path: Path) -> None:
    encoder, why = media.hardware(NO_GPU, 64, 64)
    assert encoder == media.X264 and why.startswith("h264_nvenc does not start: ") and "\n" not in why
    media.write_mp4(tmp_path / "a.mp4", clip(3, 64, 64), 16, encoder)
    assert codec(tmp_path / "a.mp4") == "h264"


def test_a_gpu_that_encodes_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "NVENC", media.MPEG4)  # in place of one, an encoder that starts on this machine
    encoder, why = media.hardware(3, 33, 31)
    assert (encoder.name, encoder.options["gpu"], why) == ("mpeg4", "3", "")
    media.write_mp4(tmp_path / "a.mp4", clip(3, 33, 31), 16, encoder)
    assert codec(tmp_path / "a.mp4") == "mpeg4" and far(decoded(tmp_path / "a.mp4")[:, :33, :31], clip(3, 33, 31)) < 6


def test_pyav_may_be_built_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"libx264"})
    assert media.hardware(0, 64, 64) == (media.X264, "PyAV was built without h264_nvenc")


def test_where_the_gpu_fails_at_one_video_the_cpu_makes_it(tmp_path: Path) -> None:
    busy = replace(media.NVENC, options={**media.NVENC.options, "gpu": str(NO_GPU)})
    media.write_mp4(tmp_path / "a.mp4", clip(3, 64, 64), 16, busy)
    assert codec(tmp_path / "a.mp4") == "h264" and far(decoded(tmp_path / "a.mp4"), clip(3, 64, 64)) < 6


def test_a_video_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    media.write_mp4(path, clip(3, 32, 32), 16)
    media.write_mp4(path, clip(5, 32, 32), 16)
    assert len(decoded(path)) == 5 and os.listdir(tmp_path) == ["a.mp4"]


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "write", full)
        media.write_mp4(tmp_path / "a.mp4", clip(3, 32, 32), 16)
    assert os.listdir(tmp_path) == []


def boxes(sheet: Image.Image) -> list[tuple[int, int]]:
    """From where to where, downwards, something stands on the sheet."""
    ground = Image.new("RGB", sheet.size, sheet.getpixel((0, 0)))
    filled = np.asarray(ImageChops.difference(sheet, ground)).any(axis=(1, 2))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], filled.astype(int), [0]]))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_a_sheet_shows_first_and_last_and_frames_between_them() -> None:
    frames = np.arange(33, dtype=np.uint8)[:, None, None, None] * np.ones((1, 96, 96, 3), np.uint8)
    sheet = np.asarray(media.contact_sheet([("counting", frames)], columns=5))
    middle = sheet[60, :, 0]
    assert [int(value) for value in dict.fromkeys(middle.tolist()) if value < 33] == [0, 8, 16, 24, 32]


@pytest.mark.parametrize(
    ("count", "columns", "chosen"), [(1, 5, [0]), (3, 5, [0, 1, 2]), (33, 5, [0, 8, 16, 24, 32]), (33, 1, [0])]
)
def test_frames_are_spaced_evenly_and_none_is_shown_twice(count: int, columns: int, chosen: list[int]) -> None:
    assert media.spaced(count, columns) == chosen


def test_small_frames_are_enlarged_and_large_ones_reduced() -> None:
    small, large = (media.contact_sheet([("", clip(5, *size))]) for size in ((96, 96), (480, 832)))
    assert boxes(small)[0] == (8, 8 + 192) and boxes(large)[0] == (8, 8 + 185)
    assert {color for _, color in small.getcolors() or ()} == {RED, GREEN, small.getpixel((0, 0))}, "as they are"


def test_each_clip_has_its_caption_below() -> None:
    sheet = media.contact_sheet([("a red field", clip(5, 96, 96)), ("another", clip(3, 64, 96))])
    assert [end - start > 100 for start, end in boxes(sheet)] == [True, False, True, False]
    assert all(end - start > 10 for start, end in boxes(sheet)), "letters are large enough to read"


@pytest.mark.parametrize(("caption", "lines"), [("", 0), ("word " * 30, 2), ("w" * 120, 3), ("word " * 10_000, 4)])
def test_long_captions_are_wrapped_and_endless_ones_cut(
    caption: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "_font", lambda: ImageFont.load_default(22))  # the same on every machine
    sheet = media.contact_sheet([(caption, clip(5, 96, 96))])
    top, *text = boxes(sheet)
    assert top[1] - top[0] == 192 and len(text) == lines
    edge = np.asarray(sheet)[:, -8:]
    assert (edge == edge[0, 0]).all(), "nothing runs over the edge"


@pytest.mark.parametrize("caption", ["größe 漢字 🙂", "\ud800\0\x07", "two\nlines\tand a tab"])
def test_any_caption_can_be_drawn(caption: str) -> None:
    assert len(boxes(media.contact_sheet([(caption, clip(5, 96, 96))]))) == 2


def test_a_sheet_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one clip"):
        media.contact_sheet([])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The output folder of a run with two videos."""
    folder = tmp_path / "run"
    (folder / "videos").mkdir(parents=True)
    for id, prompt in (("b", "a green field"), ("a", "a red field")):
        record = replace(RECORD, id=id, prompt=prompt)
        store.write_video(folder / "videos" / f"{id}.h5", clip(9, 96, 96), record, EVENTS)
    return folder


def test_the_tool_draws_a_run_in_the_order_of_its_videos(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(run), "-o", "sheet.png", "-c", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sheet.png: 2 videos\n", "")
    wanted = media.contact_sheet([("a red field", clip(9, 96, 96)), ("a green field", clip(9, 96, 96))], 3)
    assert ImageChops.difference(Image.open(tmp_path / "sheet.png"), wanted).getbbox() is None


CASES = ["missing", "empty", "text.h5", "other.h5", "run -c 0", "run -o no/such/folder.png", "run -o sheet.unknown"]


@pytest.mark.parametrize("words", CASES)
def test_the_tool_says_in_one_line_what_is_wrong(
    words: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    Path("empty").mkdir()
    Path("text.h5").write_text("no video")
    with h5py.File("other.h5", "w") as file:
        file.create_dataset("x", data=1)
    assert runpy.run_path(str(TOOL))["main"](words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("contact_sheet: ") and error.count("\n") == 1
    assert not Path("sheet.png").exists()

"""Tools that take something out of a video, and the one that checks it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpcdit.output import store
from hpcdit.output.trace import EVENT
from tests.unit.test_store import EVENTS, RECORD
from tools import export, export_trace, validate

FRAMES = np.zeros((9, 32, 32, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
SAMPLING = {
    "num_frames": 9, "height": 32, "width": 32, "steps": 2, "guidance_scale": 4.0, "seed": 7, "fps": 16,
    "max_sequence_length": 64,
}  # fmt: skip
PLAN = {  # of what is stored, what every video has
    "method": "torus", "ulysses": 2, "ring": 2, "pieces": 0, "groups": 1, "replicas": 1, "cfg": 1, "batch": 1,
    "step_s": 0.1,
}  # fmt: skip
MODEL = {"name": "demo", "family": "wan", "fingerprint": "0f" * 32, "dtype": "float32"}
WHOLE = replace(RECORD, sampling=SAMPLING, plan=PLAN, model=MODEL, cluster={"ranks": 4, "nodes": 2})


@pytest.fixture
def video(tmp_path: Path) -> Path:
    store.write_video(tmp_path / "v.h5", FRAMES, WHOLE, EVENTS)
    return tmp_path / "v.h5"


def test_a_sequence_of_png_files_is_the_frames(video: Path, tmp_path: Path) -> None:
    assert export.main([str(video), "-o", str(tmp_path / "png"), "-f", "1:6:2"]) == 0
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["00001.png", "00003.png", "00005.png"]
    for number, name in zip((1, 3, 5), names, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / name)), FRAMES[number])


def test_a_gif_lasts_as_long_as_the_frames(video: Path, tmp_path: Path) -> None:
    assert export.main([str(video), "-o", str(tmp_path / "v.gif")]) == 0
    with Image.open(tmp_path / "v.gif") as picture:
        assert picture.n_frames == 9 and picture.info["loop"] == 0  # type: ignore[attr-defined]
        lasts = 0
        for i in range(9):
            picture.seek(i)
            lasts += picture.info["duration"]
            assert abs(int(np.asarray(picture.convert("RGB"))[0, 0, 0]) - 20 * i) < 4
    assert lasts == pytest.approx(9 / 16 * 1000, abs=10)


def test_a_part_becomes_a_film_of_its_own(video: Path, tmp_path: Path) -> None:
    assert export.main([str(video), "-o", str(tmp_path / "v.mp4"), "-f", "4:"]) == 0
    with av.open(str(tmp_path / "v.mp4")) as film:
        assert film.streams.video[0].frames == 5


def test_frames_can_be_taken_backwards(video: Path) -> None:
    numbers, frames, fps = export.read(video, "7:1:-2")
    assert list(numbers) == [7, 5, 3] and np.array_equal(frames, FRAMES[7:1:-2]) and fps == 8


@given(st.integers(1, 20), st.text("0123456789:-", max_size=8))
@settings(deadline=None)
def test_frames_are_chosen_as_python_slices(count: int, words: str) -> None:
    try:
        parts = [int(part) if part else None for part in words.split(":")]
        wanted = list(range(count))[slice(*parts)] if len(parts) > 1 else [range(count)[parts[0]]]  # type: ignore[index]
    except (ValueError, TypeError, IndexError):
        wanted = []
    try:
        assert list(export.chosen(words, count)) == wanted
    except ValueError as error:
        assert not wanted and "--frames=" in str(error)


@pytest.mark.parametrize(
    ("words", "what"),
    [(["-o", "v.avi"], "--output=v.avi: allowed: .gif or .mp4"), (["-o", "v.gif", "-f", "9:"], "frames 0 to 8")],
)
def test_what_cannot_be_exported_is_one_line(
    words: list[str], what: str, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(video), *words]) == 2
    line = capsys.readouterr().err
    assert what in line and line.count("\n") == 1


def test_a_trace_is_what_perfetto_reads(video: Path, tmp_path: Path) -> None:
    assert export_trace.main([str(video), "-o", str(tmp_path / "t.json")]) == 0
    rows = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [row for row in rows if row["ph"] == "X"]
    assert [(s["name"], s["pid"], s["cat"], s["ts"], s["dur"]) for s in spans] == [
        ("encode", 0, "compute", 0.0, 500_000.0),
        ("write", 2, "io", 2_000_000.0, 1_250_000.0),
    ]
    assert spans[1]["args"] == {"bytes": 4096}
    names = {(row["pid"], row.get("tid")): row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert names[0, None] == "rank 0" and names[2, spans[1]["tid"]] == "io"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30))
@settings(deadline=None)
def test_spans_of_a_track_nest(spans: list[tuple[int, int]]) -> None:
    events = np.array([(b"x", 0, b"inter", a, a + d, 0) for a, d in spans], EVENT)
    events = events[np.lexsort((-events["end"], events["start"]))]
    drawn = [row for row in export_trace.rows(events) if row["ph"] == "X"]
    assert len(drawn) == len(spans)
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            if one["tid"] == other["tid"]:
                a, b, c, d = one["ts"], one["ts"] + one["dur"], other["ts"], other["ts"] + other["dur"]
                assert b <= c + 0.1 or d <= b + 0.1, "one after the other, or inside"
                assert a <= c


def test_a_file_without_a_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_trace.main([str(tmp_path / "none.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_video_is_valid(video: Path) -> None:
    assert validate.main([str(video)]) == 0


IMAGES = ("/images: 8 pictures", "/images/00003: not the frame")


def spoil(file: h5py.File, how: str) -> None:
    if how == "seed":
        file.attrs["seed"] = "seven"
    elif how == "sampling":
        file.attrs["sampling"] = json.dumps({**SAMPLING, "steps": 0})
    elif how == "plan":
        del file.attrs["plan"]
    elif how == "stranger":
        file.attrs["stranger"] = 1
    elif how == "image":
        del file["frames"].attrs["CLASS"]
    elif how == "/images: 8 pictures":
        del file["images/00003"]
    elif how == "/images/00003: not the frame":
        file.move("images/00003", "images/4")
        file.move("images/00004", "images/00003")
        file.move("images/4", "images/00004")
    elif how == "frames":
        file.attrs["sampling"] = json.dumps({**SAMPLING, "num_frames": 8})
    else:
        file.attrs["config"] = "{"


@pytest.mark.parametrize("how", ["seed", "sampling", "plan", "stranger", "image", "frames", "json", *IMAGES])
def test_whatever_is_wrong_is_said(how: str, video: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    with h5py.File(video, "r+") as file:
        spoil(file, how)
    assert validate.main([str(video)]) == 1
    assert how.replace("json", "cannot be read").replace("stranger", "stranger") in capsys.readouterr().out.lower()


def test_a_damaged_frame_is_found(video: Path) -> None:
    with h5py.File(video) as file:
        place = file["frames"].id.get_chunk_info(4).byte_offset
    with video.open("r+b") as raw:
        raw.seek(place)
        raw.write(b"\xff" * 8)
    assert validate.main([str(video)]) == 1

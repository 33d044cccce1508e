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
from hpcdit.output.report.pricing import Priced
from hpcdit.output.trace import EVENT
from tests.unit.test_report import PLAN as PRICED
from tests.unit.test_report import STEPS
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


def kept_by_perfetto(rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Name, start and end (ns) of what its trace processor keeps, by the rules of its source: times are multiplied by
    1000 and cut; of a track, what begins inside a span and ends after it is dropped."""
    kept, tracks = [], dict[tuple[int, int], list[int]]()
    spans = [(int(row["ts"] * 1000), int(row["dur"] * 1000), row) for row in rows if row["ph"] == "X"]
    for start, length, row in sorted(spans, key=lambda each: each[0]):
        ends = tracks.setdefault((row["pid"], row["tid"]), [])
        while ends and ends[-1] <= start:
            ends.pop()
        if not ends or start + length <= ends[-1]:
            ends.append(start + length)
            kept.append((row["name"], start, start + length))
    return kept


def test_a_trace_is_what_perfetto_reads(video: Path, tmp_path: Path) -> None:
    assert export_trace.main([str(video), "-o", str(tmp_path / "t.json")]) == 0
    rows = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert kept_by_perfetto(rows) == [("encode", 0, 500_000_000), ("write", 2_000_000_000, 3_250_000_000)]
    spans = {row["name"]: row for row in rows if row["ph"] == "X"}
    assert spans["write"]["args"] == {"bytes": 4096}
    names = {(row["pid"], row.get("tid")): row["args"]["name"] for row in rows if row["name"].endswith("_name")}
    assert [names[spans[name]["pid"], None] for name in spans] == ["rank 0", "rank 2"]
    assert [names[spans[name]["pid"], spans[name]["tid"]] for name in spans] == ["compute", "io"]
    assert all(row["pid"] for row in rows), "process 0 is nobody's"


@given(st.lists(st.tuples(st.floats(0, 1e-5), st.floats(0, 1e-5)), max_size=30), st.floats(0, 1e5))
@settings(deadline=None)
def test_perfetto_drops_nothing(spans: list[tuple[float, float]], zero: float) -> None:
    events = np.array([(b"x", 0, b"inter", zero + a, zero + a + d, 0) for a, d in spans], EVENT)
    rows = list(export_trace.rows(events, export_trace.nanoseconds(zero)))
    wanted = [(round(float(each["start"]) * 1e9), round(float(each["end"]) * 1e9)) for each in events]
    start = export_trace.nanoseconds(zero)
    assert sorted((a, b) for _, a, b in kept_by_perfetto(rows)) == sorted((a - start, b - start) for a, b in wanted)


def test_what_the_simulator_foretold_stands_beside_each_step(tmp_path: Path) -> None:
    """Four ranks on two nodes, four layers with two predictions of guidance each; two steps."""
    later = STEPS.copy()
    later["start"] += 5
    later["end"] += 5
    path = tmp_path / "v.h5"
    store.write_video(path, FRAMES, replace(WHOLE, plan=PRICED), np.concatenate([STEPS, later]))
    assert export_trace.main([str(path), "-o", str(tmp_path / "t.json")]) == 0
    rows = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    named = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    ranks = [word for n in range(4) for word in (f"rank {n}", f"rank {n}, predicted")]
    assert [named[pid] for pid in sorted(named)] == ranks, "next to each other"
    told = [row for row in rows if row["ph"] == "X" and named[row["pid"]] == "rank 1, predicted"]
    steps = [row for row in told if row["name"] == "step"]
    assert [round(step["ts"] / 1e6, 6) for step in steps] == [0, 5], "where the measured ones begin"
    priced = Priced.of(PRICED, SAMPLING)
    plan = priced and priced.best(priced.fixed)
    assert plan and steps[0]["dur"] == pytest.approx(plan.step_s * 1e6)
    assert len([row for row in told if row["name"] == "other computing"]) == 2 * 4 * 2
    assert {row["cat"] for row in told} >= {"compute", "inter"}
    assert len(kept_by_perfetto(rows)) == len([row for row in rows if row["ph"] == "X"])


def test_a_long_trace_is_foretold_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    priced = Priced.of(PRICED, SAMPLING)
    whole = export_trace.predicted(STEPS, priced)
    monkeypatch.setattr(export_trace, "FORETOLD", len(whole) // 2)
    part = export_trace.predicted(STEPS, priced)
    assert (part["name"] == b"step").sum() == 4 and len(whole) * 0.4 < len(part) <= len(whole) // 2 + 4


def test_a_file_without_a_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_trace.main([str(tmp_path / "none.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("image", ["", "0f" * 32])
def test_a_whole_video_is_valid(image: str, tmp_path: Path) -> None:
    store.write_video(tmp_path / "v.h5", FRAMES, replace(WHOLE, image=image), EVENTS)
    assert validate.main([str(tmp_path / "v.h5")]) == 0


IMAGES = ("/images: 0 pictures", "/images: 8 pictures", "/images/00003: not the frame")


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
    elif how == "/images: 0 pictures":  # as earlier versions wrote them
        del file["images"]
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

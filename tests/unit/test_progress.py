"""What rank 0 tells of a run of several groups."""

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdit.output.record import Row
from hpcdit.output.store import Index
from hpcdit.render import live, notes, progress


def test_the_line_shows_what_every_group_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    rows = [Row(n, name, "", 0) for n, name in enumerate("abc")]
    report = progress.Report(Index(tmp_path, rows), logging.Logger("test"), dict.fromkeys("abc", 4), there=0)
    report.hear({"what": "step", "group": 1, "ids": ["c"], "step": 0})
    report.hear({"what": "step", "group": 0, "ids": ["a", "b"], "step": 2})
    report.hear({"what": "ended", "group": 1, "id": "c", "status": "done", "seconds": 1.0, "reason": ""})
    report.hear({"what": "idle", "group": 1})
    report.hear({"what": "step", "group": 0, "ids": ["a", "b"], "step": 3})
    lines = [line.rpartition(", ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "0/3 videos, c step 1/4",
        "0/3 videos, a +1 step 3/4, c step 1/4",
        "1/3 videos, c done",
        "1/3 videos, a +1 step 4/4",
    ]
    assert report.tally.done == 1


class Screen:
    """As much of a terminal as the view uses: lines, going up, and clearing what is below."""

    def __init__(self, text: str) -> None:
        lines, row = [""], 0
        for code, plain in re.findall(r"\x1b\[([0-9;]*[A-Za-z])|([^\x1b]+)", text):
            if code.endswith("A"):
                row -= int(code[:-1])
            elif code == "J":
                del lines[row:]
                lines.append("")
            for n, part in enumerate(plain.split("\n")):
                if n:
                    row += 1
                    lines[row:] = [*lines[row:], ""] if len(lines) <= row else lines[row:]
                lines[row] += part.replace("\r", "")
        self.lines = [line.rstrip() for line in lines]


def test_a_terminal_shows_groups_and_failures_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    rows = [Row(n, name, "", 0) for n, name in enumerate("abc")]
    log = progress.open_log(tmp_path / "run.log")
    report = progress.Report(Index(tmp_path, rows), log, dict.fromkeys("abc", 4), there=0)
    for step in range(3):
        report.hear({"what": "step", "group": 0, "ids": ["a"], "step": step})
        report.hear({"what": "step", "group": 1, "ids": ["b", "c"], "step": step})
    report.hear(
        {"what": "ended", "group": 1, "id": "b", "status": "failed", "seconds": 1.0, "reason": "no\nmemory " * 50}
    )
    report.hear({"what": "ended", "group": 0, "id": "a", "status": "done", "seconds": 1.0, "reason": ""})
    report.close()
    text = capsys.readouterr().err
    screen = Screen(text).lines
    assert screen[0].startswith("1/3 videos, 1 failed, ") and re.search(r" \d+ videos an hour", screen[0])
    assert screen[2].startswith("0 a ") and screen[2].endswith("step 3/4") and screen[3].startswith("1 b +1 ")
    assert screen[4].startswith("b failed: no memory no memory ") and screen[5:] == [""], (
        "nothing is left of earlier drawings"
    )
    assert max(map(len, screen)) < 80 and "\x1b[?25l" not in text, "the cursor stays, whatever ends the run"


def test_many_groups_fit_a_terminal() -> None:
    at = {n: live.At(f"video {n}", 1, 4) for n in range(100)}
    lines = Screen(live.drawn(live.State("head", 0.5, at, [(str(n), "x") for n in range(50)]), 60)).lines
    assert len(lines) <= 16 and "and 92 more groups" in lines and "49 failed: x" in lines


def test_a_full_disk_is_told_once_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    log = progress.open_log(Path("/dev/full"))
    log.info("one")
    log.info("two")
    assert capsys.readouterr().err == "hpcdit: /dev/full: cannot be written: No space left on device\n"


def test_what_other_runs_have_made_is_told_apart_and_counts_in_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five videos of four steps this run makes one in 8 s while others make two: 12 steps, of 8 that are left."""
    clock, changed = [100.0], list[Row]()
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def look() -> list[Row]:
        found = changed[:]
        changed.clear()
        return found

    def end(id: str, status: str = "done") -> None:
        changed.append(Row(0, id, "", 0, status))
        clock[0] += 100.0  # in which a look is due

    rows = [Row(n, name, "", 0) for n, name in enumerate("abcdefg")]
    index = Index(tmp_path, rows, look=look)
    report = progress.Report(index, logging.Logger("test"), dict.fromkeys("abcdef", 4), there=1)
    end("f")  # while this run still loads: it says nothing of how quick the others are
    end("g")  # of nobody's list here
    report.begins(0, ["a"], "a plan")
    assert report.tally.theirs == {"f": "done"} and report.tally.left_s == 0
    clock[0] += 8.0
    changed += [Row(0, id, "", 0, "done") for id in "abc"]  # a: the file of this run's own, before it is told
    for step in range(4):
        report.step(0, ["a"], step)
    report.ended("a", "done", 8.0, "")
    assert report.tally.left_s == pytest.approx(8.0 / 12 * 8)
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "1/6 videos, 3 by other runs, 2 to go (1 were there), a done, 5 s left"
    end("d", "failed")
    report.close()
    notes.summary(tmp_path, report, there=1, most_failures=None)
    assert capsys.readouterr().out.startswith(
        "hpcdit: 1 video done in 5 min 8 s, 1 were there, 3 done by other runs, 1 failed in other runs (see job.h5),"
        " 1 left to runs that are at work"
    )


@pytest.mark.parametrize(
    ("cuda", "dtype", "weights", "said"),
    [(True, "float32", 2 * 10**9, 1), (False, "float32", 2 * 10**9, 0), (True, "bfloat16", 2 * 10**9, 0),
     (True, "float32", 4 * 10**6, 0)],
)  # fmt: skip
def test_large_models_in_float32_on_gpus_are_spoken_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cuda: bool, dtype: str, weights: int, said: int
) -> None:
    report = progress.Report(Index(tmp_path, []), logging.Logger("test"), {}, there=0)
    device: Any = SimpleNamespace(cuda=cuda)
    notes.warn_float32(device, dtype, weights, report)
    assert capsys.readouterr().err.count("hpcdit: model.dtype=float32: ") == said

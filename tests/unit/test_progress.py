"""What rank 0 tells of a run of several groups."""

import logging
from pathlib import Path

import pytest

from hpcdit.output.record import Row
from hpcdit.output.store import Index
from hpcdit.render import progress


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
    assert report.done == 1


def test_a_full_disk_is_told_once_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    log = progress.open_log(Path("/dev/full"))
    log.info("one")
    log.info("two")
    assert capsys.readouterr().err == "hpcdit: /dev/full: cannot be written: No space left on device\n"

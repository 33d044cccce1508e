"""What is read off a trace about idle time."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcdit.output.trace import EVENT
from tools.bench.idle import main, read

ROWS = [  # two steps of one pass each, of 10 s with 3 s of waits in the first, two of which at the same time
    ("encode", 0, "compute", 0, 100, 0),
    ("step", 0, "compute", 100, 112, 0),
    ("pass", 0, "compute", 101, 111, 0),
    ("pull k", 0, "inter", 102, 104, 0),
    ("pull v", 0, "inter", 103, 104, 0),
    ("wait o", 0, "inter", 110, 113, 0),
    ("attend", 0, "compute", 104, 109, 0),
    ("step", 0, "compute", 113, 125, 0),
    ("between steps", 0, "io", 112, 114, 0),
    ("pass", 0, "compute", 114, 124, 0),
    ("decode", 0, "compute", 114, 200, 0),
    ("step", 1, "compute", 100, 110, 0),
    ("pass", 1, "compute", 100, 110, 0),
]


def run(folder: Path, **videos: list[tuple]) -> Path:
    (folder / "videos").mkdir()
    for name, rows in videos.items():
        with h5py.File(folder / "videos" / f"{name}.h5", "w") as file:
            file["trace/events"] = np.array(rows, EVENT)
    return folder


def test_busy_is_what_passes_do_not_wait(tmp_path: Path) -> None:
    found = read(run(tmp_path, a=ROWS))
    assert list(found) == [0, 1]
    idle = found[0]
    assert (idle.steps, idle.window_s, idle.busy_s, idle.attend_s) == (2, 25, 17, 5)
    assert idle.between == [2] and found[1].between == []
    assert (found[1].busy_s, found[1].window_s) == (10, 10)


def test_videos_that_were_denoised_together_count_once(tmp_path: Path) -> None:
    later = [(name, rank, lane, start + 1000, end + 1000, size) for name, rank, lane, start, end, size in ROWS]
    assert read(run(tmp_path, a=ROWS, b=ROWS, c=later))[0].steps == 4


def test_the_table_has_a_line_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run(tmp_path, a=ROWS))]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["0", "2", "68.0%", "32.0%", "20.0%", "2000.000", "2000.000"]
    assert second.split() == ["1", "1", "100.0%", "0.0%", "0.0%", "nan", "nan"]


@pytest.mark.parametrize("rows", [None, [("encode", 0, "compute", 0, 1, 0)]])
def test_a_folder_without_traced_steps_is_refused(rows: list | None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no traced steps"):
        main([str(run(tmp_path, **({"a": rows} if rows else {})))])

"""What scaling.py makes of its rows, and how it ends what hangs."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpcdit.errors import InputError
from tools.bench import scaling_rows
from tools.bench.scaling_rows import AUTO, BEGUN, Row, add, goal, picks, read
from tools.bench.watched import watched

STEP = Row("step", "720x1280", 8, 1, AUTO, "cfg 2 x ring 1 x 4", 2.5, 2.6)
ALONE = replace(STEP, ranks=1, plan="ulysses 1 x 1", seconds=19.0)
RING = Row("attention", "L=8192 H=24", 8, 1, "ring 1 x 8", "ring 1 x 8", 1e-3)


def test_rows_come_back_as_they_were_written_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert read(path) == {}
    noted = replace(ALONE, note='of "4" layers, peak')
    for row in (replace(STEP, seconds=None, note=BEGUN), STEP, noted, replace(RING, seconds=None, note=BEGUN)):
        add(path, row)
    assert list(read(path).values()) == [STEP, noted, replace(RING, seconds=None, note=BEGUN)]
    scaling_rows.settle(path, "ended with 9")
    assert list(read(path).values()) == [STEP, noted, replace(RING, seconds=None, note="ended with 9")]
    scaling_rows.write(path, [STEP])
    add(path, RING)
    assert list(read(path).values()) == [STEP, RING]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", ",".join(vars(STEP)) + "\nstep,x,eight,1,auto,,,,\n"])
def test_another_file_is_not_taken_for_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=r"rows\.csv.*allowed: .*what, case"):
        read(tmp_path / "rows.csv")


def test_the_goal_is_of_the_speed_up_over_one_rank() -> None:
    assert goal([STEP]).endswith("not measured")  # without one rank
    assert goal([STEP, ALONE]).endswith("0.950, reached")
    assert goal([replace(STEP, seconds=2.6), ALONE]).endswith("0.913, missed")
    line = next(line for line in scaling_rows.table([STEP, ALONE]).splitlines() if "2500.000" in line)
    assert line.split()[-4:] == ["2500.000", "7.60", "0.950", "1.04"]


def test_picks_are_compared_with_all_of_ours_on_as_many_ranks() -> None:
    torus = replace(RING, nodes=8, asked="torus 8 x 1", plan="torus 8 x 1", seconds=0.8e-3)
    pick = replace(RING, nodes=4, asked=AUTO)
    rival = replace(RING, asked="yunchang 1 x 8", plan="FA3", seconds=0.5e-3)
    failed, fewer = replace(torus, asked="a", seconds=None), replace(torus, ranks=4, seconds=0.1e-3)
    assert picks([pick, RING, rival, failed, fewer]) == ["the planner's picks: nothing to compare them with"]
    far, count = picks([pick, RING, torus, rival, failed, fewer])
    assert far.startswith("slower by 25.0%: attention L=8192 H=24 on 8 as 4 nodes: ring 1 x 8 1.000 ms")
    assert "torus 8 x 1 0.800 ms" in far and "in 0 of 1 cells" in count
    (near,) = picks([replace(pick, seconds=0.83e-3), torus])
    assert "in 1 of 1 cells; the worst is slower by 3.7%" in near


def test_lists_of_the_command_line() -> None:
    turns, sizes, lengths = scaling_rows.turns, scaling_rows.sizes, scaling_rows.lengths
    assert turns(None, 8) == (8, 1, 4, 2) and turns(None, 1) == (1,) and turns("2,8", 8) == (2, 8)
    assert sizes("720x1280,64x96") == ((720, 1280), (64, 96)) and lengths("8k,512") == (8192, 512)
    for bad in (lambda: turns(None, 6), lambda: turns("3", 8), lambda: sizes("720x1281"), lambda: lengths("8K")):
        with pytest.raises(InputError, match="allowed"):
            bad()


def test_a_command_that_ends_is_waited_for() -> None:
    assert watched([sys.executable, "-c", ""], time.monotonic() + 60) == ""
    assert watched([sys.executable, "-c", "exit(3)"], time.monotonic() + 60) == "ended with 3"


@pytest.mark.parametrize("how", ["late", "quiet", "asked"])
def test_ranks_that_hang_are_ended(how: str, tmp_path: Path) -> None:
    ranks = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path(os.environ['PMI_RANK']).write_text(str(os.getpid())); time.sleep(600)"
    )
    progress = tmp_path / "progress"
    progress.touch()
    mpirun = [
        str(Path(sys.executable).parent / "mpirun"),
        "-n",
        "2",
        "-wdir",
        str(tmp_path),
        sys.executable,
        "-c",
        ranks,
    ]
    start = time.monotonic()
    if how == "asked":
        watching = f"from tools.bench.watched import watched; watched({mpirun}, {start + 60})"
        with subprocess.Popen([sys.executable, "-c", watching]) as process:
            time.sleep(4)
            process.terminate()
        assert process.returncode == 128 + signal.SIGTERM
    else:
        limits = {"late": (4, 60), "quiet": (60, 4)}[how]
        why = watched(mpirun, start + limits[0], progress, limits[1])
        assert why == {"late": "the time was up", "quiet": "nothing was heard of it for 4 s"}[how]
    assert time.monotonic() - start < 30
    for rank in "01":
        pid = (tmp_path / rank).read_text()
        assert subprocess.run(["ps", "-p", pid, "-o", "args="], capture_output=True).stdout == b""


@pytest.mark.parametrize("words", [("--ranks", "6"), ("--only", "step"), ("--sizes", "720p"), ("--csv", __file__)])
def test_bad_input_is_one_line(words: tuple[str, str], tmp_path: Path) -> None:
    program = Path(__file__).parents[2] / "tools/bench/scaling.py"
    ended = subprocess.run([sys.executable, program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith(f"scaling: {words[0]}: ") and "allowed: " in line
    assert not list(tmp_path.iterdir())

"""The crash campaign: some rounds of it, and that it notices programs which are broken on purpose.

HPCDIT_CRASH_ROUNDS asks for more rounds than each fault once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = 10
ROUNDS = int(os.environ.get("HPCDIT_CRASH_ROUNDS", FAULTS))
SEED = 1

DAMAGES = """
for path in pathlib.Path("disk/out/videos").glob("[!.]*.h5"):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
os.execv(program[0], program)
"""
LEAVES = """
subprocess.call(["setsid", "sh", "-c", "sleep 100 &"])
os.execv(program[0], program)
"""
HANGS = """
if subprocess.call(program):
    time.sleep(100)
"""


def campaign(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/crash_campaign.py"), "--folder", str(folder / "rounds"), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120 + 60 * ROUNDS)


def test_no_fault_loses_a_video_hangs_or_leaves_a_process(tmp_path: Path) -> None:
    ended = campaign(tmp_path, "--rounds", str(ROUNDS), "--seed", str(SEED), "--ranks", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rounds, met = (int(number) for number in ended.stdout.splitlines()[-1].split()[2:4])
    assert rounds == ROUNDS and met > rounds // 2, ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "body, seed, words",
    [
        pytest.param(DAMAGES, 10, "has changed", id="damages"),  # killed when all is written
        pytest.param(LEAVES, 10, "left a process over", id="leaves"),
        pytest.param(HANGS, 1, "hangs after 10 s", id="hangs"),  # while it loads
    ],
)
def test_a_broken_program_is_noticed(body: str, seed: int, words: str, tmp_path: Path) -> None:
    program = f"program = [sys.executable, '-m', 'hpcdit', *sys.argv[1:]]\n{body}"
    (tmp_path / "broken.py").write_text(f"import os, pathlib, subprocess, sys, time\n{program}")
    only = ("--kinds", "rank", "--ranks", "1", "--rounds", "1", "--seed", str(seed))
    ended = campaign(tmp_path, "--program", f"{sys.executable} {tmp_path / 'broken.py'}", *only)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert words in ended.stdout and "again: python tools/crash_campaign.py --kinds rank" in ended.stdout
    assert (tmp_path / "rounds" / f"round-{seed}").is_dir()

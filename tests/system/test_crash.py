"""The crash campaign: some rounds of it, and that it notices programs which are broken on purpose.

HPCDIT_CRASH_ROUNDS asks for more rounds than each fault twice.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = 10
ROUNDS = int(os.environ.get("HPCDIT_CRASH_ROUNDS", 2 * FAULTS))
SEED = 1

# By round: what is finished is changed by the next run, a process is left over, a killed run does not end.
# Their faults come when all is written, at the start, and while it loads.
BROKEN = {126: "has changed", 127: "left a process over", 128: "hangs after 7 s"}
PROGRAM = """
import os, pathlib, subprocess, sys, time
program = [sys.executable, "-m", "hpcdit", *sys.argv[1:]]
match pathlib.Path.cwd().name:
    case "round-126":
        for path in pathlib.Path("disk/out/videos").glob("[!.]*.h5"):
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(bytes(1000))
    case "round-127":
        subprocess.call(["setsid", "sh", "-c", "sleep 100 &"])
    case "round-128":
        if subprocess.call(program):
            time.sleep(100)
        sys.exit()
os.execv(program[0], program)
"""


def campaign(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/crash_campaign.py"), "--folder", str(folder / "rounds"), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["--jobs", "2"]  # while one round waits, another one computes
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120 + 60 * ROUNDS)


def test_no_fault_loses_a_video_hangs_or_leaves_a_process(tmp_path: Path) -> None:
    ended = campaign(tmp_path, "--rounds", str(ROUNDS), "--seed", str(SEED), "--ranks", "2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rounds, met = (int(number) for number in ended.stdout.splitlines()[-1].split()[2:4])
    assert rounds == ROUNDS and met > rounds // 2, ended.stdout
    assert not list(tmp_path.iterdir())


def test_a_program_that_is_broken_in_three_ways_is_noticed_in_each(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(PROGRAM)
    one_by_one = ("--kinds", "rank", "--ranks", "1", "--chain", "1", "--timeout-s", "2")
    seeds = ("--rounds", str(len(BROKEN)), "--seed", str(min(BROKEN)))
    ended = campaign(tmp_path, "--program", f"{sys.executable} {tmp_path / 'broken.py'}", *one_by_one, *seeds)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    for seed, words in BROKEN.items():
        assert re.search(rf"(?m)^ +{seed}  rank .*FAILED.*\n.*{words}", ended.stdout), ended.stdout
        again = f"--kinds rank --ranks 1 --chain 1 --rounds 1 --seed {seed}"
        assert f"again: python tools/crash_campaign.py {again}\n" in ended.stdout
        assert (tmp_path / "rounds" / f"round-{seed}").is_dir()

"""NVSHMEM between two GPUs: runs transport_cases.py under mpirun, and looks at what it says of each case."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.gpu.transport_cases import CASES, DEAD
from tests.require import needs

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def missing() -> str:
    """What there is not, for a test on two GPUs."""
    if torch.cuda.device_count() < 2:
        return "needs two GPUs"
    if MPIRUN is None:
        return "needs mpirun"
    return "" if importlib.util.find_spec("nvshmem") else "needs nvshmem4py"


pytestmark = needs("gpus", missing())


def run(*names: str, options: tuple[str, ...] = (), timeout_s: float = 900) -> tuple[int, str]:
    """The exit code, and what was said."""
    command = [str(MPIRUN), *options, "-n", "2", sys.executable, "-m", "tests.gpu.transport_cases", *names]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s)
    print(ended.stdout)
    return ended.returncode, ended.stdout


@cache
def said() -> dict[str, str]:
    """The line of each case. One that breaks the program is blamed with all it said, and the rest runs in a new one."""
    found: dict[str, str] = {}
    while names := [name for name in CASES if name not in found]:
        code, text = run(*names)
        for outcome, name, detail in re.findall(r"^(ok|FAIL) ([^:\n]+): (.*)$", text, re.MULTILINE):
            found[name] = f"{outcome} {detail}"
        begun = re.findall(r"^run (.*)$", text, re.MULTILINE)
        if broken := [name for name in names if name not in found]:
            blamed = begun[-1] if begun and begun[-1] in broken else broken[0]
            found[blamed] = f"broke the program, which ended with {code}: {text[-6000:]}"
            if not begun:  # it does not even start
                found.update((name, found[blamed]) for name in broken)
        elif code and "FAIL" not in text:
            found[names[-1]] = f"the program ended with {code}: {text[-6000:]}"
    return found


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    assert said()[name].startswith("ok "), said()[name]


@pytest.mark.parametrize("name", DEAD)
def test_a_rank_that_is_gone_is_named_in_time(name: str) -> None:
    # Else the launcher of MPICH kills the rank that is left before it can say a word.
    _, text = run(name, options=("-disable-auto-cleanup",), timeout_s=120)
    line = re.search(rf"^ok {re.escape(name)}: after ([\d.]+) s: (.*)$", text, re.MULTILINE)
    assert line, text[-6000:]
    assert 2 < float(line[1]) < 15
    assert "no sign of life from rank 1" in line[2]
    if "graph" not in name:  # there it is the meeting at the graph's begin that the rank does not come to
        assert re.search(r"[qkv] \(tokens of rank 1, heads \d\), .*from rank 1", line[2])

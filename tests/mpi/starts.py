"""Starting what the tests of this folder run under mpirun: a case by itself, or many in one start.

To start ranks and import torch and diffusers takes longer than most cases. Cases that a table of a test module has, and
that the tests which are selected ask for by `@case(name)`, run one after the other in one start for each number of
ranks.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def mpirun(ranks: int, function: str, *args: str, module: str = "tests.mpi.cases", timeout_s: float = 400) -> Any:
    """What a function of the module returns on rank 0."""
    results, said = start(ranks, [[module, function, *args]], timeout_s)
    assert results, said
    return results[0]


def start(ranks: int, cases: Sequence[Sequence[str]], timeout_s: float) -> tuple[list[Any], str]:
    """What cases return on rank 0, up to the first that fails, and what was said. A case: module, function, args."""
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable]
    command += ["-m", "tests.mpi.under_mpi", *cases[0], *(word for case in cases[1:] for word in ("+", *case))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    said = ended.stdout[-2000:] + ended.stderr[-4000:]
    lines = [line.removeprefix("RESULT ") for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) == len(cases):
        assert ended.returncode == 0, said
    return [json.loads(line) for line in lines], said


@dataclass(frozen=True)
class Case:
    """words: the arguments, from the tests' fixtures and a folder of the case's own."""

    ranks: int
    function: str
    words: Callable[[pytest.FixtureRequest, Path], Sequence[str]] = lambda request, folder: ()
    module: str = "tests.mpi.cases"


@dataclass(frozen=True)
class Found:
    """result: None if the start ended before the case did, and `said` why."""

    result: Any
    folder: Path
    said: str


def case(*names: str) -> pytest.MarkDecorator:
    """What a test looks at, one after the other: the fixture `found` is what came of it."""
    return pytest.mark.parametrize("found", names, indirect=True)


def together(request: pytest.FixtureRequest, cases: Mapping[str, Case], made: dict[str, Found]) -> Found:
    """What came of the case that the test asks for; `made` are those of the starts so far, and gets those of this one.

    They run in the order of `cases`.
    """
    name = request.param
    if name not in made:
        tests = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
        asked = {test.params.get("found") for test in tests if test}
        these = [one for one in cases if one in asked and cases[one].ranks == cases[name].ranks]
        folders = {one: request.getfixturevalue("tmp_path_factory").mktemp("case") for one in these}
        words = [[c.module, c.function, *c.words(request, folders[one])] for one in these for c in (cases[one],)]
        results, said = start(cases[name].ranks, words, timeout_s=200 * len(these))
        results += [None] * (len(these) - len(results))
        made.update({one: Found(result, folders[one], said) for one, result in zip(these, results, strict=True)})
    assert made[name].result is not None, made[name].said
    return made[name]

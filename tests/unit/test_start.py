"""What the program sets before anything is imported."""

import gc
import io
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdit import app
from hpcdit.__main__ import work
from hpcdit.terminal import say


@pytest.fixture
def collector() -> Iterator[None]:
    """On again afterwards."""
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize(
    "given, waits",
    [
        ({}, ("passive", "2000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"OMP_WAIT_POLICY": "passive"}, ("passive", None)),
    ],
)
def test_threads_wait_as_the_environment_says_or_spin_for_a_moment_and_sleep(
    given: dict[str, str], waits: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    environment = {**given, "MPI_LOCALRANKID": "1"}  # the first rank of a host also looks for what others left
    monkeypatch.setattr("os.environ", environment)
    seen = list[tuple[str | None, ...]]()

    def main(tell_guard: object) -> int:
        seen.append(tuple(environment.get(name) for name in names))
        return 5

    monkeypatch.setattr(app, "main", main)
    assert work(lambda timeout_s: None) == 5
    assert seen == [waits]


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", f"exec {shlex.quote(sys.executable)} {line}"], text=True, capture_output=True)


@pytest.mark.parametrize(
    "line, code",
    [
        ("--help >/dev/full", 0),
        ("--version >/dev/full", 0),
        ("--cfg job >/dev/full", 0),
        ("mode=plan >&-", 0),
        ("foo 2>/dev/full", 2),
        ("mode=plan sampling.steps=3 >/dev/full 2>/dev/full", 0),
    ],
)
def test_nothing_breaks_where_nobody_can_read_what_is_said(line: str, code: int) -> None:
    ended = shell(f"-m hpcdit {line}")
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def test_a_stream_without_a_letter_gets_its_number() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    say("out/\xfc\u5706", stream)
    assert stream.buffer.getvalue() == b"out/\xfc\\u5706\n"


def test_files_never_get_the_numbers_of_streams_that_were_closed(tmp_path: Path) -> None:
    code = (
        "import sys; from hpcdit.__main__ import open_streams; open_streams(); file = open(sys.argv[1], 'w');"
        " print('out'); print('error', file=sys.stderr); file.write(str(file.fileno() > 2))"
    )
    ended = shell(f'-c "{code}" {shlex.quote(str(tmp_path / "x"))} <&- >&- 2>&-')
    assert (ended.returncode, (tmp_path / "x").read_text()) == (0, "True")


def test_of_several_modes_the_last_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["mode=plan", "mode=report", "output.dir=nowhere"]) == 2
    assert "no report" in capsys.readouterr().err
    assert app.main(["mode=report", "mode=plan"]) == 0
    assert "Chosen: " in capsys.readouterr().out

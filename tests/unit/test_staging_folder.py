"""The folders of links that ranks of a host load a model from: none is left for good, none is taken from the living."""

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from hpcdit.models.loading import inspect
from hpcdit.models.staging import PREFIX, remove_left, staged
from tests.checkpoints import make_wan

HOLD = f"""if True:
    import fcntl, os, sys, tempfile
    place = tempfile.mkdtemp(prefix={PREFIX!r})
    fcntl.flock(os.open(place, os.O_RDONLY), fcntl.LOCK_EX)
    print(place, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that such folders are made in."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_what_a_killed_process_left_is_removed_and_only_that(temporary: Path) -> None:
    precious = temporary / "precious"
    precious.write_text("kept")
    (temporary / "another").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        place = Path(maker.stdout.readline().decode().strip())
        (place / "vae").mkdir()
        (place / "vae" / "weights").symlink_to(precious)
        remove_left()
        assert place.is_dir(), "its maker lives"
        maker.kill()
    remove_left()
    assert sorted(path.name for path in temporary.iterdir()) == ["another", "precious"]
    assert precious.read_text() == "kept"


def test_a_folder_in_use_stays_while_others_start_and_goes_in_the_end(tmp_path: Path, temporary: Path) -> None:
    folder = inspect(make_wan(tmp_path / "model"))
    with ExitStack() as stack:
        first, second = (stack.enter_context(staged(folder, "bfloat16", None, shared=True)) for _ in range(2))
        assert first != second and list(first.glob("*/*.safetensors")) and list(second.glob("*/*.safetensors"))
    assert list(temporary.iterdir()) == []

"""The folders of links that ranks of a host load a model from: none is left for good, none is taken from the living."""

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
    assert not list(temporary.glob(f"{PREFIX}*"))


def test_layers_that_will_be_moved_are_cast_into_files_of_their_own(tmp_path: Path) -> None:
    """So that each takes its memory with it; the libraries load the same numbers of them."""
    import torch
    from diffusers import WanTransformer3DModel

    folder = inspect(make_wan(tmp_path / "model", layers=3))
    with ExitStack() as stack:
        one, apart = (stack.enter_context(staged(folder, "bfloat16", None, True, moved)) for moved in (False, True))
        assert len(list(one.glob("transformer/*.safetensors"))) == 1
        files = sorted(path.name for path in apart.glob("transformer/*.safetensors"))
        layers = [f"diffusion_pytorch_model-blocks-{n}.safetensors" for n in range(3)]
        assert files == [*layers, "diffusion_pytorch_model.safetensors"]
        options: dict = {"dtype": torch.bfloat16, "local_files_only": True, "use_safetensors": True}
        models = [WanTransformer3DModel.from_pretrained(place / "transformer", **options) for place in (one, apart)]
        whole, parts = (dict(model.named_parameters()) for model in models)
        assert whole.keys() == parts.keys()
        for name, values in whole.items():
            assert values.dtype == parts[name].dtype and values.equal(parts[name]), name
        files_of = [{file_of(p) for p in block.parameters()} for block in models[1].blocks]
        assert [len(each) for each in files_of] == [1, 1, 1] and len(set.union(*files_of)) == 3


def file_of(tensor: Any) -> str:
    """The inode of the file that a tensor's memory is a mapping of."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(word, 16) for word in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            assert "memfd:hpcdit-transformer" in line
            return line.split()[4]
    raise AssertionError

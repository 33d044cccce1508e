"""What may be in an output folder before a run writes there, and what one run keeps from another."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdit.config import load
from hpcdit.errors import InputError
from hpcdit.models import rows
from hpcdit.output import catalog, packing, store
from hpcdit.output.claims import FOLDER as CLAIMS
from hpcdit.render import batch
from hpcdit.render.batch import CHECKPOINTS, output_folder, prepare
from tests.unit.test_store import EVENTS, FRAMES, RECORD


def test_what_is_checked_first_takes_no_torch() -> None:
    code = "import sys, hpcdit.render.batch; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "x"}\n')
    (tmp_path / "outside" / "folder").mkdir(parents=True)
    (tmp_path / "outside" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def refusal(out: Path, *args: str) -> str:
    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out}", *args])
    assert config is not None
    with pytest.raises(InputError) as caught:
        prepare(config, [0])
    message = str(caught.value)
    assert message.isprintable() and (out.parent / "outside" / "file").read_text() == "precious"
    assert sorted(path.name for path in (out.parent / "outside").iterdir()) == ["file", "folder"]
    return message


@pytest.mark.parametrize("name", ["videos", CHECKPOINTS, CLAIMS, *batch.FILES])
@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
def test_a_link_in_the_output_folder_is_refused_wherever_it_leads(name: str, target: str, out: Path) -> None:
    (out / name).symlink_to(out.parent / "outside" / target)
    message = refusal(out)
    assert message.endswith(f"{out / name} is a symbolic link; allowed: one for the output folder itself")


@pytest.mark.parametrize("way", ["zstd", "blosc2-zstd"])
def test_a_compression_whose_plugin_is_missing_is_refused(way: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_available", lambda number: False)
    wanted = "needs a plugin of HDF5; allowed: `pip install 'hpcdit[zstd]'`, or gzip, lzf or none"
    assert refusal(out, f"output.compression={way}") == f"output.compression={way}: {wanted}"


def test_the_output_folder_itself_may_be_a_link(out: Path) -> None:
    (out.parent / "scratch").symlink_to(out)
    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out.parent / 'scratch'}"])
    assert config is not None and len(prepare(config, [0]).todo) == 1


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to(path.parents[2] / "outside" / "file"), os.mkfifo, Path.mkdir]
)
def test_a_video_that_is_no_file_is_refused_unopened_and_in_the_index_it_has_failed(
    make: Callable[[Path], None], out: Path
) -> None:
    (out / "videos").mkdir()
    make(out / "videos" / "x.h5")
    assert refusal(out).endswith("videos/x.h5: not a regular file; remove it to have it rendered again")
    assert [(row.id, row.status) for row in catalog.rebuild(out).rows] == [("x", "failed")]


@pytest.mark.parametrize("name", ["videos", CHECKPOINTS, CLAIMS])
def test_a_file_where_a_folder_is_wanted_is_refused(name: str, out: Path) -> None:
    (out / name).touch()
    assert refusal(out).endswith(f"{out / name}: not a folder")


def test_videos_without_traces_want_less_of_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 3 * 33 * 96 * 96
    monkeypatch.setattr(batch.shutil, "disk_usage", lambda place: SimpleNamespace(free=room))
    assert "0.000912 GB are free on that disk" in refusal(out)
    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out}", "trace.level=0"])
    assert config is not None and len(prepare(config, [0]).todo) == 1


@pytest.mark.parametrize("where, name, blamed", [(Path, "is_symlink", batch.LOCK), (os, "scandir", "")])
def test_a_folder_that_may_not_be_looked_into_is_one_line(
    where: object, name: str, blamed: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(where, name)

    def denied(path: Path) -> object:
        if out in (path, path.parent):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(where, name, denied)  # modes do not keep root out
    assert refusal(out) == f"output.dir={out}: cannot be written: {out / blamed}: Permission denied"


@pytest.mark.parametrize("name", ["videos", batch.LOCK])
def test_a_folder_that_can_no_longer_be_made_when_the_run_begins_is_one_line(name: str, out: Path) -> None:
    (out / name).symlink_to("nowhere")  # as good as a disk that filled meanwhile
    with pytest.raises(InputError, match=rf"output\.dir={out}: cannot be written: {out / name}: "):
        output_folder(out).__enter__()


@pytest.mark.parametrize("name", batch.FILES)
def test_a_pipe_where_a_file_is_to_be_written_does_not_hang(name: str, out: Path) -> None:
    os.mkfifo(out / name)
    assert "cannot be written" in refusal(out)


def test_a_link_to_a_video_outside_is_not_taken_for_a_finished_one(out: Path) -> None:
    store.write_video(out.parent / "x.h5", FRAMES, RECORD, EVENTS)
    (out / "videos").mkdir()
    (out / "videos" / "x.h5").symlink_to(out.parent / "x.h5")
    assert "not a regular file" in refusal(out)


def test_one_run_or_several_that_share_hold_a_folder(out: Path) -> None:
    refused = pytest.raises(InputError, match=r"another run is writing there; allowed: .* queue\.shared=true")
    with output_folder(out, shared=True), output_folder(out, shared=True), refused:
        output_folder(out).__enter__()
    with output_folder(out), pytest.raises(InputError, match="another run is writing there"):
        output_folder(out, shared=True).__enter__()


def test_a_file_system_without_locks_is_no_hindrance(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    for shared in (False, True):
        with output_folder(out, shared) as videos:
            path = videos / f"x{shared}.h5"
            store.write_video(path, FRAMES, RECORD, EVENTS)
            catalog.note(path, RECORD, 1.0)
            catalog.rebuild(out).write()
            assert store.read_record(path) == RECORD and (out / "job.h5").exists()


def test_bad_input_that_is_found_late_leaves_nothing_of_a_run_that_shares_removed(out: Path) -> None:
    with pytest.raises(InputError), output_folder(out, shared=True):
        (out / "job.h5").write_text("of another run")
        raise InputError("a model that does not load")
    assert (out / "job.h5").exists()


def test_what_another_run_made_before_it_let_go_of_the_folder_is_not_made_again(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone:
        def agree(self, first: Callable[[], Any], what: str) -> Any:
            return first()

    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out}"])
    assert config is not None
    found, world = prepare(config, [0]), Alone()
    later = replace(found, todo=(), done=found.todo)
    monkeypatch.setattr(batch, "prepare", lambda config, nodes: later)
    with output_folder(out) as videos:
        assert batch.as_it_is_now(config, world, [0], found) is found  # type: ignore[arg-type]
        (videos / "x.h5").touch()
        assert batch.as_it_is_now(config, world, [0], found) == later  # type: ignore[arg-type]


def test_rows_are_refused_where_the_model_s_vae_cannot_be_cut(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out}", "parallel.vae=rows"])
    assert config is not None and len(prepare(config, [0]).todo) == 1
    monkeypatch.setattr(rows, "CLASSES", ("AutoencoderKLLTXVideo",))
    said = refusal(out, "parallel.vae=rows")
    assert said.startswith("parallel.vae=rows: ") and "AutoencoderKLWan cannot be cut into rows; allowed: auto" in said
    config = load([f"prompts={out.parent / 'p.jsonl'}", f"output.dir={out}"])
    assert config is not None and len(prepare(config, [0]).todo) == 1

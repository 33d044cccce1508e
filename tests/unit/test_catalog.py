"""The catalog saves opening finished videos, and never tells anything else than they would."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.output import catalog, store
from hpcdit.output.catalog import Catalog, Entry
from tests.unit.test_store import EVENTS, FRAMES, RECORD, ROOT


def written(folder: Path, *ids: str) -> None:
    (folder / "videos").mkdir(exist_ok=True)
    for id in ids:
        path, record = folder / "videos" / f"{id}.h5", replace(RECORD, id=id, prompt=f"prompt\n of {id} \ud800")
        store.write_video(path, FRAMES, record, EVENTS)
        catalog.note(path, record, 3.25)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The videos that were opened."""
    names: list[str] = []
    read = store.read_video

    def noted(path: Path) -> tuple[store.VideoRecord, float]:
        names.append(path.stem)
        return read(path)

    monkeypatch.setattr(catalog, "read_video", noted)
    return names


def known(folder: Path) -> dict[str, Entry]:
    found = Catalog(folder)
    return {id: found.entry(id) for id in sorted(found.files)}


def test_what_a_writer_notes_is_what_opening_the_video_tells(tmp_path: Path, opened: list[str]) -> None:
    written(tmp_path, "a", "b")
    noted = known(tmp_path)
    assert opened == [] and sorted(noted) == ["a", "b"]
    assert noted["a"].prompt == "prompt\n of a \ud800" and noted["a"].sampling == RECORD.sampling
    (tmp_path / catalog.NAME).unlink()
    assert known(tmp_path) == noted and opened == ["a", "b"]
    assert known(tmp_path) == noted and opened == ["a", "b"], "one slow start"


def touch(folder: Path) -> None:
    os.utime(folder / "videos" / "b.h5", ns=(1, 1))


def grow(folder: Path) -> None:
    file = (folder / "videos" / "b.h5").stat()
    with (folder / "videos" / "b.h5").open("ab") as more:
        more.write(b"\0")
    os.utime(folder / "videos" / "b.h5", ns=(file.st_atime_ns, file.st_mtime_ns))


def edit(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        path = folder / catalog.NAME
        *before, line = path.read_bytes().rstrip(b"\n").split(b"\n")
        path.write_bytes(b"\n".join([*before, change(line)]))

    return edited


SPOILED = {
    "another time": touch,
    "another size": grow,
    "cut off": edit(lambda line: line[:-9]),
    "no newline": edit(lambda line: line),
    "another prompt": edit(lambda line: line.replace(b"of b", b"of c") + b"\n"),
    "not ours": edit(lambda line: b'{"id": "b"}\n' + b"\0" * 50 + b"\n" + b"[" * 100_000 + b"\n"),
    "of another version": edit(lambda line: line.replace(b'"size": ', b'"dates": ') + b"\n"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_line_that_does_not_hold_is_passed_over(
    spoil: Callable[[Path], None], tmp_path: Path, opened: list[str]
) -> None:
    written(tmp_path, "a", "b")
    before = {id: replace(entry, size=0, mtime_ns=0) for id, entry in known(tmp_path).items()}
    spoil(tmp_path)
    for _ in range(2):
        assert {id: replace(entry, size=0, mtime_ns=0) for id, entry in known(tmp_path).items()} == before
    assert opened == ["b"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), max_size=4), st.binary(max_size=30))
def test_whatever_becomes_of_its_bytes_the_catalog_tells_nothing_wrong(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], junk: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "junk"
    if not folder.exists():
        folder.mkdir()
        written(folder, "a", "b", "c")
    (folder / catalog.NAME).unlink()
    before = known(folder)
    content = bytearray((folder / catalog.NAME).read_bytes())
    for place in places:
        content[place % len(content) : place % len(content) + len(junk) // 2] = junk
    (folder / catalog.NAME).write_bytes(content)
    assert known(folder) == before


def append(folder: Path, writer: int) -> None:
    for i in range(200):
        entry = Entry(f"{writer}-{i}", 1, 2, "a prompt " * (1 + i * 10), "", 0, {}, {}, 0.0)
        catalog._append(folder, entry)


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    writers = [multiprocessing.get_context("fork").Process(target=append, args=(tmp_path, n)) for n in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
    lines = [line for line in (tmp_path / catalog.NAME).read_bytes().split(b"\n") if line]
    assert {json.loads(line)[1]["id"] for line in lines} == {f"{n}-{i}" for n in range(4) for i in range(200)}
    assert all(catalog._parse(line + b"\n") for line in lines)


def test_what_others_append_is_seen_by_a_refresh(tmp_path: Path, opened: list[str]) -> None:
    written(tmp_path, "a")
    found = Catalog(tmp_path)
    written(tmp_path, "b")
    assert list(found.files) == ["a"]
    found.refresh()
    assert found.entry("b").prompt == "prompt\n of b \ud800" and opened == []


def test_a_catalog_that_cannot_be_written_costs_time_alone(tmp_path: Path, opened: list[str]) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / catalog.NAME).symlink_to(tmp_path / "outside")
    written(tmp_path, "a")
    assert sorted(known(tmp_path)) == ["a"] and opened == ["a"]
    assert (tmp_path / "outside").read_bytes() == b"mine", "a link is not followed"
    (tmp_path / catalog.NAME).unlink()
    os.mkfifo(tmp_path / catalog.NAME)
    assert sorted(known(tmp_path)) == ["a"]


READ_LOCKED = """
import fcntl, sys
from pathlib import Path
from hpcdit.output import store
path = Path(sys.argv[1])
held = path.open("rb")
fcntl.flock(held, fcntl.LOCK_EX)  # HDF5 is refused its lock, as on a file system without locks
print(store.read_record(path).prompt)
"""


@pytest.mark.parametrize("locking", ["TRUE", "FALSE", "BEST_EFFORT", None])
def test_a_video_is_read_where_hdf5_gets_no_lock_whatever_its_variable_says(
    locking: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.h5"
    store.write_video(path, FRAMES, RECORD, EVENTS)
    env = {key: value for key, value in os.environ.items() if key != "HDF5_USE_FILE_LOCKING"}
    env |= {"HDF5_USE_FILE_LOCKING": locking} if locking else {}
    command = [sys.executable, "-c", READ_LOCKED, str(path)]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert child.stdout == "a red circle\n", child.stderr


def test_nine_thousand_of_ten_thousand_videos_are_known_without_opening_one(tmp_path: Path, opened: list[str]) -> None:
    written(tmp_path, "v0")
    for i in range(1, 9000):
        (tmp_path / "videos" / f"v{i}.h5").touch()
        file = (tmp_path / "videos" / f"v{i}.h5").stat()
        catalog._append(tmp_path, Entry.of(tmp_path / f"v{i}.h5", file, replace(RECORD, prompt="a cat " * 20), 1.0))
    rows = [store.Row(i, f"v{i}", "", i) for i in range(10_000)]
    index = catalog.rebuild(tmp_path, rows)
    assert [row.status for row in index.rows] == ["done"] * 9000 + ["pending"] * 1000 and opened == []


def test_of_runs_that_share_a_folder_the_one_that_writes_last_has_all_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [store.Row(i, id, "", i) for i, id in enumerate("abcd")]
    written(tmp_path, "a")
    index = catalog.rebuild(tmp_path, rows, shared=True)
    written(tmp_path, "b")
    index.update("c", "failed", reason="no picture")
    assert [row.status for row in index.rows] == ["done", "done", "failed", "pending"]
    write = store.Index._write

    def late(index: store.Index, events: object) -> None:
        write(index, None)
        if not (tmp_path / "videos" / "d.h5").exists():  # another run ends, and writes before what is written here
            written(tmp_path, "d")

    monkeypatch.setattr(store.Index, "_write", late)
    index.write()
    with h5py.File(tmp_path / "job.h5") as file:
        assert [row["status"] for row in file["jobs"]] == [b"done", b"done", b"failed", b"done"]
        assert list(file["videos"]) == ["a", "b", "d"]


def test_the_index_of_a_shared_folder_says_what_failed_in_other_runs_and_why(tmp_path: Path) -> None:
    rows = [store.Row(i, id, "", i) for i, id in enumerate("abc")]
    (tmp_path / "claims").mkdir()
    index = catalog.rebuild(tmp_path, rows, shared=True)
    index.update("a", "failed", 7.0, "mine")
    for id, why in {"a": "mine", "b": "no picture"}.items():
        (tmp_path / "claims" / f"{id}.failed").write_text(why)
    index.write()
    index.write()
    found = [(row.status, row.seconds, row.reason) for row in index.rows]
    assert found == [("failed", 7.0, "mine"), ("failed", 0.0, "no picture"), ("pending", 0.0, "")]
    (tmp_path / "videos").mkdir(exist_ok=True)
    written(tmp_path, "b")
    index.write()
    assert [row.status for row in index.rows] == ["failed", "done", "pending"]

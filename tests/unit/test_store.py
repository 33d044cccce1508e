"""Videos and their index in HDF5: whole or absent, and readable with h5py alone."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.output import catalog, packing, store
from hpcdit.output.record import Row, VideoRecord
from hpcdit.output.trace import EVENT
from tests.require import needs

ROOT = Path(__file__).resolve().parents[2]
QUICK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where syncing many small files takes no time
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 10, 14, 3), dtype=np.uint8)
EVENTS = np.array(
    [(b"encode", 0, b"compute", 1.0, 1.5, 0), (b"write", 2, b"io", 3.0, 4.25, 4096)],
    EVENT,
)
RECORD = VideoRecord(
    id="a-red-circle",
    prompt="a red circle",
    negative_prompt="",
    seed=7,
    fps=16,
    sampling={"steps": 10, "guidance_scale": 4.0},
    model={"name": "demo", "fingerprint": "00ff"},
    plan={"method": "torus", "ulysses": 2, "ring": None},
    config={"output": {"dir": "out"}},
    software=store.software("MPICH 5.0.2"),
    cluster={"hosts": ["a", "b"], "größe": 2},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "videos" / "a-red-circle.h5"
    path.parent.mkdir()
    return path


@pytest.fixture
def video(path: Path) -> Path:
    store.write_video(path, FRAMES, RECORD, EVENTS)
    return path


def test_h5py_alone_reads_everything(video: Path) -> None:
    with h5py.File(video) as file:
        frames = file["frames"]
        assert frames.dtype == np.uint8 and np.array_equal(frames, FRAMES)
        assert frames.chunks == (1, 10, 14, 3)
        assert [axis.label for axis in frames.dims] == ["frame", "height", "width", "channel"]
        assert frames.dims[0][0][:].tolist() == [0, 1 / 16, 2 / 16] and file["time"].attrs["unit"] == "s"
        assert frames.attrs["fps"] == 16
        events = file["trace/events"][:]
        assert events.dtype == EVENT and np.array_equal(events, EVENTS)
        attributes = dict(file.attrs)
    texts = ("schema", "id", "prompt", "negative_prompt", "seed")
    assert [attributes.pop(name) for name in texts] == ["hpcdit/1", "a-red-circle", "a red circle", "", 7]
    for name in ("sampling", "model", "plan", "config", "software", "cluster"):
        assert json.loads(attributes.pop(name)) == getattr(RECORD, name)
    assert not attributes


def test_viewers_find_pictures_and_a_table(video: Path) -> None:
    with h5py.File(video) as file:
        picture, table = dict(file["frames"].attrs), dict(file["trace/events"].attrs)
        assert "time" in file["frames"].dims[0] and file["time"].attrs["CLASS"] == b"DIMENSION_SCALE"
    assert (picture["CLASS"], picture["IMAGE_SUBCLASS"]) == (b"IMAGE", b"IMAGE_TRUECOLOR")
    assert picture["INTERLACE_MODE"] == b"INTERLACE_PIXEL"
    with h5py.File(video) as file:  # HDFView takes /frames for one picture, as its source has it, and needs each frame
        assert list(file["images"]) == ["00000", "00001", "00002"]
        for image, frame in zip(file["images"].values(), FRAMES, strict=True):
            assert np.array_equal(image, frame) and image.is_virtual, "the same data, not stored again"
            assert {key: image.attrs[key] for key in image.attrs} == {key: picture[key] for key in image.attrs}
            assert len(image.attrs) == 4
    assert table["CLASS"] == b"TABLE" and [table[f"FIELD_{i}_NAME"].decode() for i in range(6)] == list(
        EVENT.names or ()
    )


@pytest.mark.parametrize("compression", packing.WAYS)
def test_each_compression_packs_and_keeps_the_frames(compression: str, path: Path) -> None:
    flat = np.tile(FRAMES[:, :1, :1], (1, 48, 64, 1))  # noise does not get smaller
    store.write_video(path, flat, RECORD, EVENTS, compression)
    assert np.array_equal(store.read_frames(path)[0], flat)
    with h5py.File(path) as file:
        stored, filters = file["frames"].id.get_storage_size(), file["frames"].id.get_create_plist()
        assert stored == flat.nbytes if compression == "none" else stored < flat.nbytes / 2
        numbers = [filters.get_filter(i)[0] for i in range(filters.get_nfilters())]
    registered = {"none": [], "gzip": [1], "lzf": [32000], "zstd": [32015], "blosc2-zstd": [32026]}
    assert numbers == registered[compression]


WITHOUT_PLUGIN = """
import sys
sys.modules["hdf5plugin"] = None
from pathlib import Path
from hpcdit.output import packing, store
from tools import contact_sheet, export, validate
path = Path(sys.argv[1])
print(*[way for way in packing.WAYS if packing.lacks_plugin(way)])
print(store.read_record(path).id)
for read in (store.read_parts, store.read_frames):
    try:
        read(path)
    except packing.NoPlugin as error:
        print(error)
for tool in (contact_sheet, export, validate):
    print(tool.main([str(path), *(["-o", "never"] if tool is export else [])]))
"""


def test_without_the_plugin_what_needs_it_is_one_line_that_says_so(path: Path) -> None:
    store.write_video(path, FRAMES, RECORD, EVENTS, "zstd")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(path)]
    ran = subprocess.run(command, env=environment, cwd=path.parent, capture_output=True, text=True, timeout=60)
    said, *other = ran.stdout.splitlines()
    assert said == "zstd blosc2-zstd" and other[0] == RECORD.id, "a run still knows what is done"
    line = f"{path}: its frames are packed by zstd, of a plugin"
    assert [each.startswith(line) and "pip install 'hpcdit[zstd]'" in each for each in other[1:3]] == [True, True]
    assert ran.stderr.count(f"{line}") == 2 and [each for each in other if each in "012"] == ["2", "2", "1"], ran


def test_frames_that_lie_apart_in_memory_are_stored_as_they_are_seen(path: Path) -> None:
    seen = FRAMES[::2, ::-1, ::3]
    store.write_video(path, seen, RECORD, EVENTS)
    with h5py.File(path) as file:
        assert np.array_equal(file["frames"], seen)


def test_events_can_be_asked_for_after_the_frames_are_packed(path: Path) -> None:
    store.write_video(path, FRAMES, RECORD, lambda: EVENTS[1:])
    with h5py.File(path) as file:
        assert np.array_equal(file["trace/events"], EVENTS[1:])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# Any text that JSON can say, so with NULs and lone surrogates; two of those in a row it reads as one letter.
TEXT = (st.text() | st.text(st.sampled_from("aß\0\ud800\udfff"))).map(lambda text: json.loads(json.dumps(text)))
DICT = st.dictionaries(TEXT, JSON | TEXT, max_size=3)
RECORDS = st.builds(
    VideoRecord,
    **dict.fromkeys(("id", "prompt", "negative_prompt"), TEXT),
    **dict.fromkeys(("sampling", "model", "plan", "config", "software", "cluster"), DICT),
    seed=st.integers(0, 2**64 - 1),
    fps=st.integers(1, 240) | st.floats(0.01, 1000),
)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_any_record_comes_back(record: VideoRecord) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        path = Path(folder) / "video.h5"
        store.write_video(path, FRAMES[:1, :2, :2], record, EVENTS[:0])
        assert store.read_record(path) == record


EVENT_ROWS = st.tuples(
    st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=39).map(str.encode),
    st.integers(0, 2**31 - 1),
    st.sampled_from([b"compute", b"inter", b"intra", b"io"]),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
    st.integers(0, 2**63 - 1),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(EVENT_ROWS, max_size=5))
def test_any_events_come_back(rows: list[tuple]) -> None:
    events = np.array(rows, EVENT)
    with tempfile.TemporaryDirectory(dir=QUICK) as folder:
        path = Path(folder) / "video.h5"
        store.write_video(path, FRAMES[:1, :2, :2], RECORD, events)
        with h5py.File(path) as file:
            assert file["trace/events"][:].tolist() == rows


@pytest.mark.parametrize("size", [0, 65_500, 65_536, 200_000, 10_000_000])
def test_a_prompt_of_any_length_is_stored_whole(size: int, path: Path) -> None:
    prompt = ("größe " * (size // 6 + 1))[:size]
    store.write_video(path, FRAMES, replace(RECORD, prompt=prompt, sampling={"prompt": prompt}), EVENTS)
    with h5py.File(path) as file:
        assert file.attrs["prompt"] == prompt and json.loads(file.attrs["sampling"])["prompt"] == prompt
    assert store.read_record(path).prompt == prompt


def test_what_h5py_cannot_hold_is_readable_and_kept(path: Path) -> None:
    record = replace(RECORD, prompt="a\0b\ud800c")
    store.write_video(path, FRAMES, record, EVENTS)
    with h5py.File(path) as file:
        assert file.attrs["prompt"] == "a\u2400b\ufffdc"
    assert store.read_record(path) == record


def test_what_json_does_not_know_becomes_its_nearest(path: Path) -> None:
    settings = {"dir": Path("out"), "size": np.int64(3), "links": np.array([1.5, 2.0]), "shape": (1, 2)}
    store.write_video(path, FRAMES, replace(RECORD, config=settings), EVENTS)
    assert store.read_record(path).config == {"dir": "out", "size": 3, "links": [1.5, 2.0], "shape": [1, 2]}


@pytest.mark.parametrize(
    ("frames", "record", "compression", "message"),
    [
        (FRAMES.astype(float), RECORD, "gzip", "uint8"),
        (FRAMES[0], RECORD, "gzip", "uint8"),
        (FRAMES[..., :1], RECORD, "gzip", "uint8"),
        (FRAMES[:0], RECORD, "gzip", "uint8"),
        (FRAMES, replace(RECORD, seed=-1), "gzip", "seed"),
        (FRAMES, replace(RECORD, seed=2**64), "gzip", "seed"),
        (FRAMES, RECORD, "zip", "gzip, lzf, zstd, blosc2-zstd, none"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    frames: np.ndarray, record: VideoRecord, compression: str, message: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        store.write_video(path, frames, record, EVENTS, compression)
    assert os.listdir(path.parent) == []


def test_a_finished_video_is_never_overwritten(video: Path) -> None:
    before = video.read_bytes()
    with pytest.raises(FileExistsError, match=r"a-red-circle\.h5"):
        store.write_video(video, FRAMES[::-1], RECORD, EVENTS)
    assert video.read_bytes() == before and os.listdir(video.parent) == [video.name]


def test_the_same_video_is_the_same_file(video: Path) -> None:
    other = video.with_name("other.h5")
    store.write_video(other, FRAMES, RECORD, EVENTS)
    assert other.read_bytes() == video.read_bytes()


def test_a_file_that_is_not_there_is_said_to_be_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.read_record(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all" * 100, bytes(4096)])
def test_a_file_that_is_not_hdf5_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not an HDF5 file"):
        store.read_record(path)


def test_an_hdf5_file_that_is_not_ours_is_refused(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="attribute schema is missing"):
        store.read_record(path)


def remove_frames(file: h5py.File) -> None:
    del file["frames"]


def spoil_frames(file: h5py.File) -> None:
    del file["frames"]
    file["frames"] = 1.5


def remove_events(file: h5py.File) -> None:
    del file["trace/events"]


def remove_seed(file: h5py.File) -> None:
    del file.attrs["seed"]


def spoil_prompt(file: h5py.File) -> None:
    file.attrs["prompt"] = 5


def spoil_plan(file: h5py.File) -> None:
    file.attrs["plan"] = "{"


def spoil_schema(file: h5py.File) -> None:
    file.attrs["schema"] = "hpcdit/99"


SPOILED = [remove_frames, spoil_frames, remove_events, remove_seed, spoil_prompt, spoil_plan, spoil_schema]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_video_that_lacks_something_is_refused(spoil, video: Path) -> None:  # type: ignore[no-untyped-def]
    with h5py.File(video, "r+") as file:
        spoil(file)
    with pytest.raises(ValueError, match=r"a-red-circle\.h5: not a whole hpcdit video"):
        store.read_record(video)


def test_a_video_that_was_cut_short_is_refused_wherever_it_was_cut(video: Path) -> None:
    whole = video.read_bytes()
    for length in range(0, len(whole), 97):
        video.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a-red-circle"):
            store.read_record(video)


def test_errors_are_of_one_line(video: Path) -> None:
    video.write_bytes(video.read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        store.read_record(video)
    assert "\n" not in str(error.value)


needs_h5dump = needs("h5dump", "" if shutil.which("h5dump") else "h5dump is missing (Debian: hdf5-tools)")


def h5dump(*arguments: str) -> str:
    return subprocess.run(["h5dump", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@needs_h5dump
def test_a_person_reads_the_layout_with_h5dump(video: Path) -> None:
    text = h5dump("-H", str(video))
    words = ("schema", "id", "prompt", "negative_prompt", "seed", "sampling", "model", "plan", "config", "software")
    for word in (*words, "cluster", "frames", "fps", "time", "trace", "events", "name", "rank", "lane", "bytes"):
        assert f'"{word}"' in text


@needs_h5dump
def test_a_person_reads_the_values_with_h5dump(video: Path) -> None:
    attributes = h5dump("-A", str(video))
    for value in ('"a red circle"', '"hpcdit/1"', '""', '"height"', '{"steps": 10, "guidance_scale": 4.0}'):
        assert value in attributes
    rows = " ".join(h5dump("-d", "/trace/events", str(video)).split())
    assert '"encode", 0, "compute", 1, 1.5, 0' in rows


# Under a limit on the size of files, which acts like a full disk and needs no rights; exits 0 if all is well.
LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from hpcdit.output import catalog, packing, store
from tests.unit.test_store import EVENTS, RECORD

folder, frames = Path(sys.argv[1]), np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 1, 1000, 5000, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        store.write_video(folder / "video.h5", frames, RECORD, EVENTS)
    except OSError as error:
        assert error.strerror == "File too large", error
    else:
        raise AssertionError("nothing was raised")
    assert os.listdir(folder) == [], os.listdir(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.write_video(folder / "video.h5", frames, RECORD, EVENTS)
assert store.read_record(folder / "video.h5") == RECORD
"""


def test_a_write_that_the_system_refuses_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stderr) == (0, "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (root?)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_no_file_and_keeps_the_old_ones(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    index = store.Index(small_disk, [Row(0, "a", "prompt", 1)])
    index.write()
    store.write_video(small_disk / "small.h5", FRAMES, RECORD, EVENTS)
    before = {path: path.read_bytes() for path in small_disk.iterdir()}
    with pytest.raises(OSError) as error:
        store.write_video(small_disk / "large.h5", noise, RECORD, EVENTS)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as error:
        store.Index(small_disk, [Row(0, "a", "prompt" * 20_000, 1)]).write()
    assert error.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in small_disk.iterdir()} == before


def rows_of(folder: Path) -> list[tuple]:
    with h5py.File(folder / "job.h5") as file:
        return [tuple(x.decode() if isinstance(x, bytes) else x for x in row) for row in file["jobs"][:]]


def jobs(*ids: str) -> list[Row]:
    return [Row(i, id, f"prompt of {id}", 40 + i) for i, id in enumerate(ids)]


def test_the_index_tells_what_became_of_each_job(video: Path) -> None:
    folder = video.parents[1]
    index = store.Index(folder, jobs("a-red-circle", "b", "c"), every=0)
    index.update("a-red-circle", "done", 2.5)
    index.update("b", "failed", 1.0, "no picture:\0")
    index.write(EVENTS)
    assert rows_of(folder) == [
        (0, "a-red-circle", "prompt of a-red-circle", 40, "done", 2.5, ""),
        (1, "b", "prompt of b", 41, "failed", 1.0, "no picture:\u2400"),
        (2, "c", "prompt of c", 42, "pending", 0.0, ""),
    ]
    with h5py.File(folder / "job.h5") as file:
        assert file["jobs"].dtype.names == ("index", "id", "prompt", "seed", "status", "seconds", "reason")
        assert np.array_equal(file["trace/events"], EVENTS) and list(file["videos"]) == ["a-red-circle"]


def test_the_links_of_the_index_hold_when_the_folder_is_moved(video: Path, tmp_path: Path) -> None:
    index = store.Index(tmp_path, jobs("a-red-circle"))
    index.update("a-red-circle", "done", 1.0)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    with h5py.File(moved / "job.h5") as file:
        assert np.array_equal(file["videos/a-red-circle/frames"], FRAMES)
        assert file["videos/a-red-circle"].attrs["prompt"] == "a red circle"
    moved.rename(tmp_path)


def test_updates_in_quick_succession_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    index = store.Index(tmp_path, jobs("a", "b", "c"), every=5)
    statuses = []
    for later, id in ((0, "a"), (4.9, "b"), (0.2, "c")):
        now += later
        index.update(id, "done")
        statuses.append([row[4] for row in rows_of(tmp_path)])
    assert statuses == [["done", "pending", "pending"]] * 2 + [["done"] * 3]


def test_a_slow_index_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, write = 0.0, store.atomic.write

    def slow(path: Path, data: memoryview, replace: bool) -> None:
        nonlocal now
        now += 2.0
        write(path, data, replace)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(store.atomic, "write", slow)
    index = store.Index(tmp_path, jobs("a", "b", "c"), every=1)
    index.update("a", "done")
    now += 39.0
    index.update("b", "done")
    assert [row[4] for row in rows_of(tmp_path)] == ["done", "pending", "pending"]
    now += 1.5
    index.update("c", "done")
    assert [row[4] for row in rows_of(tmp_path)] == ["done"] * 3


def test_an_update_of_an_unknown_job_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        store.Index(tmp_path, jobs("a")).update("b", "done")


def test_an_index_of_10000_jobs_is_written_in_under_a_second_and_is_whole(tmp_path: Path) -> None:
    index = store.Index(tmp_path, [Row(i, f"job-{i:05}", "a red circle " * 10, i, "done") for i in range(10_000)])
    start = time.process_time()
    index.write(EVENTS)
    assert time.process_time() - start < 1
    assert [row[3] for row in rows_of(tmp_path)] == list(range(10_000))
    with h5py.File(tmp_path / "job.h5") as file:
        assert len(file["videos"]) == 10_000 and np.array_equal(file["trace/events"], EVENTS)


def test_the_index_is_rebuilt_from_the_videos_alone(video: Path) -> None:
    folder = video.parents[1]
    store.write_video(video.with_name("b.h5"), FRAMES, replace(RECORD, id="b", seed=2**64 - 1), EVENTS[:0])
    catalog.rebuild(folder).write()
    assert rows_of(folder) == [
        (0, "a-red-circle", "a red circle", 7, "done", 3.25, ""),
        (1, "b", "a red circle", 2**64 - 1, "done", 0.0, ""),
    ]


def test_a_rebuilt_index_keeps_the_order_of_the_jobs_and_knows_what_is_missing_or_broken(video: Path) -> None:
    folder = video.parents[1]
    for name in ("broken", "stranger"):
        (video.parent / f"{name}.h5").write_bytes(video.read_bytes()[: -1 if name == "broken" else None])
    (video.parent / ".hpcdit-x.part.h5").write_bytes(b"half")
    index = catalog.rebuild(folder, jobs("missing", "broken", "a-red-circle"))
    assert [(row.index, row.id, row.status) for row in index.rows] == [
        (0, "missing", "pending"),
        (1, "broken", "failed"),
        (2, "a-red-circle", "done"),
        (3, "stranger", "done"),
    ]
    assert "not a whole hpcdit video" in index.rows[1].reason and index.rows[1].prompt == "prompt of broken"


def test_the_index_of_an_empty_folder_is_empty(tmp_path: Path) -> None:
    catalog.rebuild(tmp_path).write()
    assert rows_of(tmp_path) == []


def test_the_software_is_named_with_its_versions() -> None:
    versions = store.software("MPICH 5.0.2")
    assert versions["mpi"] == "MPICH 5.0.2" and versions["hdf5"] == h5py.version.hdf5_version
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["numpy"] == np.__version__
    assert {"hpcdit", "torch", "diffusers", "h5py"} <= set(versions)


def test_the_versions_are_found_without_importing_anything_heavy() -> None:
    code = "import sys; from hpcdit.output import store; store.software(); print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert child.stdout == "False\n", child.stderr

"""What a report holds: every job, the catalog's word for finished videos, and what the planner says of a plan."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from hpcdit.app import main
from hpcdit.attention.methods import Layout
from hpcdit.config import conf_dir
from hpcdit.output import catalog, media, store
from hpcdit.output.record import Row
from hpcdit.output.report import contents, page
from hpcdit.output.report.__main__ import main as alone
from hpcdit.output.report.pricing import Priced, advise
from hpcdit.output.summary import Summary
from hpcdit.output.taxes import Rates, Times, measure
from hpcdit.output.trace import EVENT
from hpcdit.planner.costs import Costs, Link
from hpcdit.planner.presets import to_keys
from hpcdit.planner.workload import Workload
from tests.unit.test_store import EVENTS, FRAMES, RECORD

WORK = Workload(
    tokens=4096, heads=8, head_dim=64, layers=4, ffn_dim=2048, steps=10, videos=8, guided=True, latents=65536
)
COSTS = Costs(1e12, 1e12, 1e-5, 1, 1, 1e10, 1e12, Link(1e-4, 1e8), Link(1e-5, 1e10))
PLAN: dict[str, Any] = {
    **asdict(Layout("ring", 1, 4)), "replicas": 1, "cfg": 1, "tokens": 4096, "batch": 1,
    "priced": {"costs": to_keys(COSTS), "work": asdict(WORK), "nodes": [0, 0, 1, 1]},
}  # fmt: skip
STEPS = np.array(
    [
        (name, rank, lane, start, end, size)
        for rank in range(4)
        for name, lane, start, end, size in (
            (b"step", b"compute", 0.0, 2.0, 0),
            (b"pass", b"compute", 0.2, 1.9, 0),
            (b"pull k", b"inter", 0.3, 0.9, 1000),
            (b"attend", b"compute", 0.9, 1.5, 0),
        )
    ],
    EVENT,
)


def rendered(folder: Path, *ids: str, note: bool = True, events: np.ndarray = STEPS) -> None:
    (folder / "videos").mkdir(exist_ok=True)
    for id in ids:
        path, record = folder / "videos" / f"{id}.h5", replace(RECORD, id=id, prompt=f"video {id}", plan=PLAN)
        store.write_video(path, FRAMES, record, events)
        if note:
            summary = Summary.of(FRAMES[1], len(FRAMES), events, PLAN)
            catalog.note(path, record, 3.25, summary)


def column(found: contents.Contents, name: str) -> list[Any]:
    return [row[contents.COLUMNS.index(name)] for row in found.rows]


def test_every_job_has_a_row_whatever_became_of_it(tmp_path: Path) -> None:
    rendered(tmp_path, "a", "stranger")
    rows = [
        Row(0, "a", "video a", 7, "done", 3.25),
        Row(1, "b", "b", 8, "failed", 1.0, "out of memory"),
        Row(2, "c", "c", 9),
    ]
    store.Index(tmp_path, [*rows, Row(3, "gone", "gone", 1, "done", 2.0)]).write()
    found = contents.gather(tmp_path)
    assert column(found, "id") == ["a", "b", "c", "gone", "stranger"]
    assert column(found, "status") == ["done", "failed", "pending", "pending", "done"]
    assert column(found, "reason")[1] == "out of memory" and column(found, "prompt")[4] == "video stranger"
    assert [bool(picture) for picture in found.pictures] == [True, False, False, False, True]
    assert found.times.steps == 2 and found.times.inter == pytest.approx(2 * 4 * 0.6)


def test_a_damaged_video_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    rendered(tmp_path, "a")
    (tmp_path / "videos" / "b.h5").write_bytes(b"no video")
    found = contents.gather(tmp_path)
    assert column(found, "status") == ["done", "failed"] and "not an HDF5 file" in column(found, "reason")[1]


def test_what_the_catalog_knows_is_not_opened_but_for_a_few_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered(tmp_path, "whole")
    summary = Summary.of(FRAMES[1], len(FRAMES), STEPS, PLAN)
    for i in range(300):
        path = tmp_path / "videos" / f"{i:03}.h5"
        path.write_bytes(b"\x89HDF\r\n\x1a\n what would be slow to open")
        catalog.note(path, replace(RECORD, id=path.stem, plan=PLAN), float(i), summary)
    opened = []

    def noted(path: Path) -> store.Parts:
        opened.append(path)
        return store.read_parts(path)

    monkeypatch.setattr(contents, "read_parts", noted)
    found = contents.gather(tmp_path)
    assert column(found, "status") == ["done"] * 301 and len(opened) == contents.OPENED
    assert {"299.h5", "298.h5", "000.h5"} <= {path.name for path in opened}, "the slowest and the quickest"


def test_a_video_without_a_line_is_summarised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered(tmp_path, "a", "b")
    noted = contents.gather(tmp_path)
    (tmp_path / catalog.NAME).unlink()
    monkeypatch.setattr(catalog, "read_video", lambda path: pytest.fail("opened twice"))
    again = contents.gather(tmp_path)
    assert again.pictures == noted.pictures and again.times == noted.times
    monkeypatch.setattr(catalog, "read_parts", lambda path: pytest.fail("opened once more"))
    assert contents.gather(tmp_path).pictures == noted.pictures


def test_a_line_of_an_earlier_version_still_spares_opening(tmp_path: Path) -> None:
    rendered(tmp_path, "a", note=False)
    path = tmp_path / "videos" / "a.h5"
    catalog.note(path, replace(RECORD, id="a"), 1.0)
    line = (tmp_path / catalog.NAME).read_bytes()
    entry = json.loads(line)[1]
    del entry["summary"]
    content = json.dumps(entry)
    (tmp_path / catalog.NAME).write_text(f'["{catalog.zlib.crc32(content.encode()):08x}", {content}]\n')
    found = catalog.Catalog(tmp_path)
    assert found.entry("a").seconds == 1.0 and found.summary("a").times.steps == 1


def test_a_trace_that_is_long_keeps_its_steps() -> None:
    many = np.repeat(STEPS, 100)
    kept = contents.thinned(many, 1000)
    assert len(kept) == 1000 and (kept["name"] == b"step").sum() == 400


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    rendered(tmp_path, "a")
    store.Index(tmp_path, [Row(0, "b", "</script><b>", 1, "failed", 1.0, "<!-- <script>")]).write()
    text = page.write(tmp_path).read_text()
    assert not re.search(r"""(src|href)=["'](https?:|//)|@import|url\(""", text)
    assert (
        "</script><b>" not in text
        and "<!--" not in text
        and "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    )


def test_small_films_are_part_of_the_page_large_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered(tmp_path, "a b")
    media.write_mp4(tmp_path / "videos" / "a b.mp4", np.repeat(FRAMES, 4, axis=1), 16)
    assert contents.gather(tmp_path).films[0].startswith("data:video/mp4;base64,")
    monkeypatch.setattr(contents, "EMBEDDED", 10)
    assert contents.gather(tmp_path).films == {0: "videos/a%20b.mp4"}


def test_the_planner_says_what_would_be_faster() -> None:
    priced = Priced.of(PLAN, {"steps": 10})
    assert priced is not None and priced.layout == Layout("ring", 1, 4)
    advice = advise(priced, "float32")
    assert advice["sync"].override == "parallel.replicas=4", "no transfers at all, on links as slow as these"
    assert advice["sync"].after_s < advice["sync"].before_s == priced.best(priced.fixed).makespan_s  # type: ignore[union-attr]
    assert advice["traffic"].override == "", "a CPU computes no faster in bfloat16"
    gpu = replace(priced, costs=replace(COSTS, lanes=132, tile=128))
    assert advise(gpu, "float32")["traffic"].override == "model.dtype=bfloat16"


def on_gpus(dtype: str) -> tuple[Priced, np.ndarray]:
    """Wan 2.1 14B on two nodes of eight H100 by USP, and a step as their streams' events have it: attention calls with
    a transfer behind each, of which one is late, and the host between two steps."""
    costs = dict(OmegaConf.load(conf_dir() / "cluster" / "4x8-h100.yaml").costs)
    work = Workload(
        tokens=32760, heads=40, head_dim=128, layers=40, ffn_dim=13824, steps=50, videos=4, guided=True,
        latents=16 * 21 * 60 * 104, itemsize=4 if dtype == "float32" else 2,
    )  # fmt: skip
    priced = {"costs": costs, "work": asdict(work), "nodes": [0] * 8 + [1] * 8}
    layout = {**asdict(Layout("usp", 8, 2)), "replicas": 1, "cfg": 1, "tokens": work.tokens, "batch": 1}
    found = Priced.of({**layout, "priced": priced}, {"steps": 50})
    assert found is not None
    spans = [
        (b"step", 0, b"compute", 0.0, 3.0, 0), (b"pass", 0, b"compute", 0.01, 2.99, 0),
        (b"attend", 0, b"compute", 0.1, 1.1, 0), (b"pull k", 0, b"inter", 0.1, 1.6, 10**9),
        (b"attend", 0, b"compute", 1.6, 2.6, 0), (b"pull v", 0, b"intra", 1.7, 1.8, 10**9),
        (b"step", 0, b"compute", 3.2, 6.0, 0), (b"between steps", 0, b"io", 3.0, 3.2, 0),
        (b"attend", 0, b"compute", 3.3, 4.3, 0),
    ]  # fmt: skip
    return found, np.array(spans, EVENT)


def test_on_gpus_each_tax_is_measured_and_has_an_override_with_its_price() -> None:
    priced, events = on_gpus("float32")
    times = measure(events, Rates.of(to_keys(priced.costs)))
    assert (times.inter, times.intra) == (pytest.approx(0.5), 0), "what is behind attention costs nothing"
    assert times.sync == pytest.approx(0.48, abs=1e-3), "its bytes take 20 ms at 50 GB/s: the rest was waiting"
    assert times.launch == pytest.approx(0.2) and times.outside == pytest.approx(2.02)
    advice = advise(priced, "float32")
    for tax in ("sync", "inter", "intra", "imbalance"):
        assert advice[tax].override == "parallel.replicas=4"
        assert advice[tax].after_s < advice[tax].before_s
    assert advice["traffic"].override == "model.dtype=bfloat16"
    assert advice["launch"].override == "" and advice["launch"].why == "parallel.batch=2 is less than 1% faster"
    assert advice["launch"].after_s != advice["launch"].before_s, "that has a price, too"
    assert priced.traffic_s() > 0 and priced.calls_s(times.calls) == 3 * priced.costs.call_s


def test_halves_of_guidance_that_wait_for_each_other_are_a_cost_that_replicas_save() -> None:
    """On two ranks each half computes one prediction, and sends it to the other once a step; alone none is sent."""
    work = replace(WORK, tokens=64, videos=40, latents=2**26)
    priced = {"costs": to_keys(COSTS), "work": asdict(work), "nodes": [0, 0]}
    plan = {**PLAN, **asdict(Layout("ulysses", 1, 1)), "cfg": 2, "tokens": 64, "priced": priced}
    found = Priced.of(plan, {"steps": 10})
    assert found is not None
    advice = advise(found, "float32")
    for tax in ("sync", "intra", "imbalance"):
        assert advice[tax].override == "parallel.replicas=2" and advice[tax].after_s < advice[tax].before_s
    now = found.best(found.fixed)
    assert now is not None and found.moved(now) == (0, 2 * work.exchange_bytes())


def test_where_nothing_is_faster_no_override_is_named() -> None:
    plan = {**PLAN, **asdict(Layout("ulysses", 1, 1)), "replicas": 4}
    priced = Priced.of(plan, {"steps": 10})
    assert priced is not None
    best = advise(priced, "float32")
    assert best["sync"].override == best["inter"].override == "" and best["inter"].why


def test_a_plan_of_an_earlier_version_has_no_price() -> None:
    assert Priced.of(RECORD.plan, RECORD.sampling) is None
    assert Priced.of({**PLAN, "priced": {}}, {"steps": 10}) is None


def test_the_report_is_written_by_the_program_and_on_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rendered(tmp_path, "a", events=EVENTS)
    assert main(["mode=report", f"output.dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"hpcdit: {tmp_path / 'report.html'}\n"
    (tmp_path / "report.html").unlink()
    assert alone([str(tmp_path)]) == 0 and (tmp_path / "report.html").is_file()
    capsys.readouterr()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_videos_is_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["mode=report", f"output.dir={tmp_path / name}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"hpcdit: output.dir={tmp_path / name}: no report") and line.count("\n") == 1
    assert alone([str(tmp_path / name)]) == 2 and not (tmp_path / name / "report.html").exists()


def test_times_survive_the_catalog() -> None:
    summary = Summary.of(FRAMES[0], 3, STEPS, PLAN)
    again = Summary.from_dict(json.loads(json.dumps(summary.to_dict())))
    assert again.shape == (3, 10, 14) and again.picture == summary.picture
    assert again.times == Times(**summary.times.to_dict())

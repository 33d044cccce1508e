"""The report as people use it: in Chromium, with mouse and keyboard."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcdit.output import catalog, media, store
from hpcdit.output.record import Row
from hpcdit.output.report import page as report
from hpcdit.output.summary import Summary
from tests.system.browser import chromium, opened, started
from tests.unit.test_report import PLAN, STEPS
from tests.unit.test_store import RECORD

pytestmark = chromium
SHAPES = ("red circle", "blue star", "green square")
MANY = 10_000


def clip(n: int) -> np.ndarray:
    frames = np.full((12, 48, 64, 3), (60 * n, 200 - 50 * n, 90), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 4 * i : 4 * i + 8] = 255
    return frames


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos with films and traces, and two that failed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "videos").mkdir()
    rows = []
    for n, shape in enumerate(SHAPES):
        path, id = folder / "videos" / f"{n}.h5", str(n)
        record = replace(
            RECORD, id=id, prompt=f"a {shape} moving", seed=30 - n, plan=PLAN, sampling={"steps": 1, "fps": 16}
        )
        media.write_mp4(path.with_suffix(".mp4"), clip(n), 16)
        store.write_video(path, clip(n), record, STEPS)
        catalog.note(path, record, [5.0, 90.0, 7.0][n], Summary.of(clip(n)[6], 12, STEPS, PLAN))
        rows.append(Row(n, id, record.prompt, record.seed, "done"))
    rows += [Row(3 + n, f"bad{n}", "a purple cat", 2**63 + n, "failed", 1.0, "out of memory <b>") for n in range(2)]
    store.Index(folder, rows).write()
    return report.write(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, small: Path) -> Iterator[Any]:
    with opened(browser, small) as page:
        yield page


def prompts(page: Any) -> list[str]:
    return list(page.locator("#sheet li a").all_inner_texts())


def test_the_overview_says_what_became_of_the_job(page: Any) -> None:
    for name, number in (("videos done", "3"), ("failed", "2"), ("slowest", "90.0 s"), ("frames", "36")):
        assert page.locator("#numbers div", has_text=name).locator("dd").inner_text() == number
    assert page.locator("#failures summary").inner_text() == "2 x out of memory <b>"
    assert page.locator("#tax-rows tr[data-tax=sync] code").inner_text() == "parallel.replicas=4"
    assert "transfers between nodes, not hidden: 30.0 %" in page.locator("#shares").inner_text()


def test_pictures_are_shown_whole(page: Any) -> None:
    page.locator("#sheet li[data-n='0'] img").scroll_into_view_if_needed()
    outside = "image => image.getBoundingClientRect().bottom - image.parentElement.getBoundingClientRect().bottom"
    assert page.locator("#sheet li[data-n='0'] img").evaluate(outside) <= 0


def test_costs_of_nothing_are_left_out_and_so_are_parts(page: Any) -> None:
    assert page.locator("#tax-rows tr[data-tax=inter]").count() == 1
    assert page.locator("#tax-rows tr[data-tax=intra]").count() == 0
    assert "inside nodes" not in page.locator("#shares").inner_text()
    assert "Beside that: encoding " in page.locator("#shares").inner_text()


def test_search_and_sort(page: Any) -> None:
    assert len(prompts(page)) == 5
    page.fill("#search", "MOVING star")
    assert prompts(page) == ["a blue star moving"] and page.locator("#count").inner_text() == "1 of 5 videos"
    page.fill("#search", "")
    page.select_option("#status", "done")
    page.select_option("#sort", "seconds")
    assert prompts(page) == ["a red circle moving", "a green square moving", "a blue star moving"]
    page.click("#direction")
    assert prompts(page)[0] == "a blue star moving"
    page.select_option("#sort", "seed")
    page.select_option("#status", "failed")
    assert page.locator("#sheet li").first.get_attribute("data-n") == "4", "seeds beyond 2**53 keep their order"
    assert "out of memory <b>" in page.locator("#sheet li small").first.inner_text()


def test_films_play_in_the_sheet_and_on_their_page(page: Any) -> None:
    playing = (
        "video => new Promise(done => { video.ontimeupdate = () => video.currentTime > 0.2 && done(video.videoWidth) })"
    )
    page.click("#sheet li[data-n='1'] .play")
    assert page.locator("#sheet li[data-n='1'] video").evaluate(playing) == 64
    page.click("#sheet li[data-n='1'] a")
    film = page.locator("#video video")
    film.evaluate("video => { video.muted = true; video.play() }")
    assert film.evaluate(playing) == 64


def view(page: Any) -> tuple[float, float]:
    start, end = page.evaluate("[timeline.from, timeline.to]")
    return start, end


def drawn(page: Any) -> str:
    return str(page.evaluate("document.querySelector('canvas').toDataURL()"))


def test_the_timeline_zooms_by_wheel_buttons_and_keys(page: Any) -> None:
    page.click("#sheet li[data-n='0'] a")
    page.wait_for_function("window.timeline")
    assert view(page) == (0, 2)
    whole = drawn(page)
    page.click("text=Zoom in")
    assert view(page) == (0.5, 1.5) and drawn(page) != whole
    page.locator("canvas").focus()
    page.keyboard.press("Home")
    assert view(page) == (0, 2) and drawn(page) == whole
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    assert view(page) == (0.75, 1.75) and page.locator("#said").inner_text() == "from 750 ms to 1.75 s"
    page.hover("canvas")
    page.mouse.wheel(0, -100)
    page.wait_for_function("timeline.to - timeline.from < 0.9")


def test_a_span_says_what_it_is(page: Any) -> None:
    page.goto(f"{page.url}#/video/0")
    page.wait_for_function("window.timeline")
    x, y = page.evaluate("[timeline.x(1.2), 20 + 5 + 1 + 5 + 1 + 5]")
    assert page.evaluate("([x, y]) => timeline.under(x, y)", [x, y]) == "rank 0, compute: attend, 600 ms from 900 ms"
    page.locator("canvas").hover(position={"x": x, "y": y})
    assert page.locator("#said").inner_text() == "rank 0, compute: attend, 600 ms from 900 ms"
    x, y = page.evaluate("[timeline.x(0.5), 20 + 5 + 1 + 5 + 1 + 11 + 1 + 5]")
    assert page.evaluate("([x, y]) => timeline.under(x, y)", [x, y]).endswith(
        "inter: pull k, 600 ms from 300 ms, 1.00 kB"
    )


def test_the_prediction_stands_beside_the_measurement(page: Any) -> None:
    page.click("#sheet li[data-n='0'] a")
    rows = page.locator("#video section").last.locator("tbody tr").all_inner_texts()
    assert any(row.startswith("a step\t2.00 s") for row in rows), rows
    page.wait_for_function("window.timeline")
    with_it = drawn(page)
    page.evaluate("timeline.prediction.spans = []; timeline.prediction.step_s = 0; timeline.draw()")
    assert drawn(page) != with_it


def test_everything_is_reached_by_keyboard_and_named(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the videos"
    page.keyboard.press("Enter")
    for _ in range(5):  # search, status, sort, direction, the first film
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Play a red circle moving"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#video h2")
    assert page.evaluate("document.activeElement.textContent") == "a red circle moving", "the page's title is read out"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, a, input, select, video, canvas, [role=img], [tabindex]')].filter(e =>"
        " !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert unnamed == []
    page.go_back()
    page.wait_for_selector("#overview:not([hidden])")


def test_on_a_narrow_screen_everything_can_be_read_without_scrolling_to_the_side(browser: Any, small: Path) -> None:
    with opened(browser, small) as page:
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        override = page.locator("#tax-rows tr[data-tax=sync] code")
        assert override.evaluate("code => code.getBoundingClientRect().right") < 390
        assert page.locator("#taxes .wide").evaluate("place => place.scrollWidth <= place.clientWidth")
        columns = page.locator("#sheet").evaluate(
            "sheet => getComputedStyle(sheet).gridTemplateColumns.split(' ').length"
        )
        assert columns == 2
        page.goto(f"{small.as_uri()}#/video/0")
        page.wait_for_function("window.timeline")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_timeline_has_no_empty_rows(page: Any) -> None:
    page.goto(f"{page.url}#/video/0")
    page.wait_for_function("window.timeline")
    assert page.evaluate("timeline.shown.map(row => row[0])") == ["step", "pass", "compute", "inter", "predicted"]


def test_it_prints_without_its_controls(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert not page.locator("#filter").is_visible() and page.locator("#sheet li").first.is_visible()
    page.pdf(path=str(tmp_path / "report.pdf"))
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    page.emulate_media(media="screen")


def test_ten_thousand_videos_open_at_once_and_few_pictures_are_loaded(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    summary = Summary.of(clip(1)[6], 12, STEPS, PLAN)
    for n in range(MANY):
        path = tmp_path / "videos" / f"{n:05}.h5"
        path.write_bytes(b"")
        record = replace(
            RECORD, id=path.stem, prompt=f"video {n} of a long job {'x' * 100}", plan=PLAN, sampling={"steps": 1}
        )
        catalog.note(path, record, float(n % 977), summary)
    start = time.monotonic()
    path = report.write(tmp_path)
    assert time.monotonic() - start < 60
    with opened(browser, path) as page:
        page.wait_for_selector("#sheet li")
        opening_s = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1e3
        assert opening_s < 3, opening_s
        assert page.locator("#sheet img").count() <= 2 * 96
        page.fill("#search", "video 9999 ")
        assert page.locator("#sheet li").count() == 1 and page.locator("#sheet img").get_attribute("src").startswith(
            "data:"
        )
        page.fill("#search", "")
        page.select_option("#sort", "seconds")
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_function("document.querySelectorAll('#sheet li').length > 150")

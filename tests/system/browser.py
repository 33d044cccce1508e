"""A real Chromium, headless, as the system has it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.require import needs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = "" if CHROMIUM and find_spec("playwright") else "Chromium or playwright is not installed"
chromium = needs("chromium", MISSING)


@contextmanager
def started() -> Iterator[Any]:
    """A browser of Playwright's. Its sandbox does not start as root in containers."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """A page that shows the file. In the end what went wrong in it is raised, and what it asked the network for."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
    page.goto(path.resolve().as_uri())
    yield page
    page.close()
    assert not wrong, wrong

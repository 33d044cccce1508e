"""The report as one HTML file that loads nothing: the page of this folder, filled."""

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import atomic
from .contents import COLUMNS, TIMES, Contents, gather

NAME = "report.html"
BLOCK = 256  # pictures that the page looks up together


def write(output_dir: Path) -> Path:
    """Writes `<output_dir>/report.html`; returns its path. Raises ValueError where there is nothing to report."""
    path = output_dir / NAME
    atomic.write(path, page(gather(output_dir)).encode("utf-8", "replace"), replace=True)
    return path


def page(contents: Contents) -> str:
    """The HTML text."""
    here = files(__package__)
    texts = {name: (here / name).read_text("utf-8") for name in ("page.html", "page.css", "chart.js", "page.js")}
    return (
        texts["page.html"]
        .replace("{{title}}", _text(contents.title))
        .replace("{{style}}", texts["page.css"])
        .replace("{{data}}", "\n".join(_data(contents)))
        .replace("{{program}}", texts["chart.js"] + texts["page.js"])
    )


def _data(contents: Contents) -> list[str]:
    """Blocks of text that the page parses when it needs them: what is not on the screen costs next to nothing."""
    c = contents
    job = {
        "title": c.title,
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "columns": COLUMNS,
        "timeNames": TIMES,
        "times": c.times.to_dict(),
        "rows": c.rows,
        "films": {at: where for at, where in c.films.items() if not where.startswith("data:")},
        "filmed": list(c.films),
        "timelines": list(c.timelines),
        "predictions": c.predictions,
        "advice": c.advice,
        "estimates": c.estimates,
        "block": BLOCK,
    }
    blocks = [_block("job", job)]
    for first in range(0, len(c.pictures), BLOCK):
        text = "\n".join(c.pictures[first : first + BLOCK])
        blocks.append(f'<script type="text/plain" id="pictures-{first // BLOCK}">{text}</script>')
    blocks += [_block(f"timeline-{at}", timeline) for at, timeline in c.timelines.items()]
    blocks += [_block(f"film-{at}", where) for at, where in c.films.items() if where.startswith("data:")]
    return blocks


def _block(id: str, value: Any) -> str:
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{id}">{text}</script>'


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")

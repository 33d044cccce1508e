"""What a person at a terminal sees of a run: a few lines that are drawn over and over in one place."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..command_line import one_line
from ..terminal import say

EVERY_S = 0.25  # between two drawings
GROUPS, FAILURES = 8, 3  # that are shown


@dataclass(frozen=True)
class At:
    """What a group is at: videos together, the step that has ended of so many."""

    videos: str
    step: int
    steps: int


@dataclass(frozen=True)
class State:
    """headline: in words; share: of all steps that are done; at: of each group; failures: ids and reasons."""

    headline: str
    share: float
    at: Mapping[int, At]
    failures: Sequence[tuple[str, str]]


class View:
    """Draws states, each over the one before. The cursor stays visible: a run may be killed at any time."""

    def __init__(self, width: int) -> None:
        self._width, self._lines, self._due = max(width - 1, 20), 0, 0.0

    def show(self, state: State, now: bool = False) -> None:
        """Leaves a drawing out that would come too soon, unless it has to be `now`."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY_S
        text = drawn(state, self._width)
        up = f"\x1b[{self._lines}A" if self._lines else ""
        self._lines = text.count("\n")
        say(f"{up}\r\x1b[J{text}", end="")


def drawn(state: State, width: int) -> str:
    """The lines of a state, with a terminal's colours; no line is longer than `width`."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="standard", legacy_windows=False
    )
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, ratio=1)
    table.add_column(width=20)
    table.add_column(justify="right", no_wrap=True)
    for number, at in sorted(state.at.items())[:GROUPS]:
        name = Text(f"{number} {at.videos}", overflow="ellipsis", no_wrap=True)
        table.add_row(name, _bar(at.step / at.steps, 20), f"step {at.step}/{at.steps}")
    whole = Table.grid()  # a bar alone would not end its line
    whole.add_row(_bar(state.share, width))
    parts: list[RenderableType] = [
        Text(state.headline, style="bold"),
        whole,
        table,
    ]
    if (more := len(state.at) - GROUPS) > 0:
        parts.append(Text(f"and {more} more groups", style="dim"))
    for id, reason in state.failures[-FAILURES:]:
        parts.append(Text(f"{id} failed: {one_line(reason)}", style="red"))
    with console.capture() as said:
        for part in parts:
            console.print(part, no_wrap=True, overflow="ellipsis")
    return said.get()


def _bar(share: float, width: int) -> ProgressBar:
    return ProgressBar(1.0, share, width, complete_style="cyan", finished_style="green")

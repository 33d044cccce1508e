"""Requests to stop, as the batch system or a person sends them."""

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """Whether the run was asked to stop, by a signal of the batch system or of a person."""

    by: str = ""
    _before: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        """From here on SIGTERM, SIGUSR1 (what Slurm sends before the time limit) and Ctrl-C are requests."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.by:  # twice: at once
            raise KeyboardInterrupt
        self.by = signal.Signals(number).name

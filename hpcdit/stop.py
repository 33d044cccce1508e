"""Requests to stop, as the batch system or a person sends them."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from .errors import Stopped

T = TypeVar("T")


class Interrupt(BaseException):
    """Leaves what can be left at any point; no Exception, since libraries catch those and try something else."""


@dataclass
class StopRequest:
    """Whether the run was asked to stop, by a signal of the batch system or of a person."""

    by: str = ""
    _before: dict[signal.Signals, Any] = field(default_factory=dict)
    _leave: bool = False

    def listen(self) -> None:
        """From here on SIGTERM, SIGUSR1 (what Slurm sends before the time limit) and Ctrl-C are requests.

        So is SIGHUP, of a terminal that is closed, but not where it is ignored (nohup).
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def __enter__(self) -> "StopRequest":
        """Listens until the end of the block."""
        self.listen()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, body: Callable[[], T]) -> T:
        """What `body` returns: what takes long and leaves nothing half done. Raises Stopped as soon as one is asked."""
        try:
            try:
                self._leave = True
                if self.by:
                    raise Interrupt
                return body()
            finally:
                self._leave = False
        except Interrupt:
            raise Stopped(f"stopped on request ({self.by}); the same command resumes") from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.by:  # twice: at once; the guard has the other ranks of the host end, too
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.by = signal.Signals(number).name
        if self._leave:
            self._leave = False
            raise Interrupt

"""A thread that beats the rank's heart and makes communication go on while the main thread computes."""

import threading
import time
from collections.abc import Callable

# What a poll asks for: the longest nap until the next one.
BUSY_S = 200e-6  # measured: with this nap a transfer hides behind compute almost wholly, at .1 of a core a rank
EXPECTING_S = 1.5e-3  # something will come, nobody knows when: attention next to shorter naps was a tenth slower
IDLE_S = 5e-3


class Service(threading.Thread):
    """Calls `beat`, which makes MPI progress, again and again, and the polls that transports add, napping in between.

    A poll returns the seconds that it may be left alone.
    """

    def __init__(self, beat: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        super().__init__(name="hpcdit-service", daemon=True)
        self._beat, self._fail = beat, fail
        self._polls: list[Callable[[], float]] = []
        self._stopped = threading.Event()

    def add(self, poll: Callable[[], float]) -> None:
        self._polls = [*self._polls, poll]

    def remove(self, poll: Callable[[], float]) -> None:
        self._polls = [p for p in self._polls if p != poll]

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._beat()
                time.sleep(min([IDLE_S, *(poll() for poll in self._polls)]))
        except BaseException as error:
            self._fail(error)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

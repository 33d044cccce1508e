"""A thread that beats the rank's heart and makes communication go on while the main thread computes."""

import threading
import time
from collections.abc import Callable

BUSY_NAP_S = 200e-6  # measured: with this nap a transfer hides behind compute almost wholly, at .1 of a core a rank
IDLE_NAP_S = 5e-3


class Service(threading.Thread):
    """Calls `beat`, which makes MPI progress, again and again, napping in between, and the polls that transports add.

    A poll returns whether it has anything under way; while one has, the naps are short.
    """

    def __init__(self, beat: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        super().__init__(name="hpcdit-service", daemon=True)
        self._beat, self._fail = beat, fail
        self._polls: list[Callable[[], bool]] = []
        self._stopped = threading.Event()

    def add(self, poll: Callable[[], bool]) -> None:
        self._polls = [*self._polls, poll]

    def remove(self, poll: Callable[[], bool]) -> None:
        self._polls = [p for p in self._polls if p != poll]

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._beat()
                busy = any([poll() for poll in self._polls])
                time.sleep(BUSY_NAP_S if busy else IDLE_NAP_S)
        except BaseException as error:
            self._fail(error)

    def stop(self) -> None:
        self._stopped.set()
        self.join()

"""`python -m hpcdit`, and the console script of that name."""

import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from . import guard, leftovers


def main() -> NoReturn:
    """Runs the program under its guard."""
    open_streams()
    guard.run(work)


def open_streams() -> None:
    """Leads standard streams that were closed (by cron, a daemon, `>&-`) to nowhere.

    Else the next files that are opened, a video's perhaps, get their numbers, and what libraries print goes there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def work(tell_guard: Callable[[float], None]) -> int:
    """What the guarded process does; the imports come after the fork, so that the guard stays small."""
    # Threads that wait for each other shall sleep: where ranks or programs share cores, spinning takes them from who
    # has work. But to wake up takes longer than the next small operation is away, so they spin for some 0.1 ms first.
    # 10 steps of a demo video take 1.1 instead of 1.4 s on two cores of its own, and a tenth longer than asleep on
    # shared ones; five times that would be 0.9 s there, and twice the time here.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # libgomp's, which comes with torch
    # Nothing that imports make is garbage; looking through it again and again takes a third of the start.
    gc.disable()
    if leftovers.first_here(os.environ):
        leftovers.remove_segments()
    from .app import main as run_program

    return run_program(tell_guard=tell_guard)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m hpcdit`, and the console script of that name."""

import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from . import guard, leftovers


def main() -> NoReturn:
    """Runs the program under its guard."""
    guard.run(work)


def work(tell_guard: Callable[[float], None]) -> int:
    """What the guarded process does; the imports come after the fork, so that the guard stays small."""
    # Threads that wait for each other shall sleep: where ranks share cores, spinning takes them from who has work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Nothing that imports make is garbage; looking through it again and again takes a third of the start.
    gc.disable()
    if leftovers.first_here(os.environ):
        leftovers.remove_segments()
    from .app import main as run_program

    return run_program(tell_guard=tell_guard)


if __name__ == "__main__":
    sys.exit(main())

"""Where the queue has its work from: this run's list alone, or a folder that several runs share."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from ..errors import BrokenRun
from ..output.claims import Claims


class Source(Protocol):
    """What is to be rendered, as positions among the jobs, in batches. For rank 0, whose calls must be quick."""

    def __bool__(self) -> bool:
        """Whether anything may be left that `take` gives."""

    def take(self) -> list[int] | None:
        """The next batch; empty if nothing is left; None: ask again in a moment."""

    def ended(self, id: str, failed: str) -> None:
        """A video that `take` gave is there, or has failed: the reason."""


class Listed:
    """A list that is this run's alone."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self._left = deque(batches)

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self) -> list[int]:
        return list(self._left.popleft()) if self._left else []

    def ended(self, id: str, failed: str) -> None:
        pass


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong inside with claims is told in one line."""
    try:
        yield
    except OSError as error:
        raise BrokenRun(f"{error.filename}: a video cannot be claimed: {error.strerror}") from error


class Shared:
    """A list that other runs go through as well: what they have claimed is left to them for as long as they live.

    File systems may be slow: a thread of its own claims and releases. At the end this run stays for the claims of runs
    that show no sign of life, until they are void. ids: of the jobs, by position.
    """

    def __init__(self, batches: Sequence[Sequence[int]], ids: Sequence[str], claims: Claims) -> None:
        self._left, self._ids, self._claims = deque(batches), ids, claims
        # What others have claimed, with the sign of life that was there when this run was through with its list.
        self._theirs: dict[int, tuple[str, int] | None] = {}
        self._pool = ThreadPoolExecutor(1, "hpcdit-claims")
        self._next: Future[list[int] | None] | None = None
        self._over = False

    def __bool__(self) -> bool:
        return not self._over

    def take(self) -> list[int] | None:
        self._next = self._next or self._pool.submit(self._claim)
        if not self._next.done():
            return None
        batch, self._next = self._next.result(), None
        self._over = batch == []
        return batch

    def ended(self, id: str, failed: str) -> None:
        if failed:
            self._pool.submit(self._claims.fail, id, failed)
        else:
            self._pool.submit(self._claims.release, id)

    def close(self) -> None:
        """Gives up what is claimed."""
        self._pool.shutdown()
        self._claims.close()

    def _claim(self) -> list[int] | None:
        with told():
            while self._left:
                batch = self._left.popleft()
                mine = [position for position in batch if self._claims.take(self._ids[position])]
                self._theirs.update((p, None) for p in batch if p not in mine and not self._ended(p))
                if mine:
                    return mine
            return self._inherit()

    def _ended(self, position: int) -> bool:
        """Whether the video is there, or has failed, in whichever run."""
        return self._claims.there(self._ids[position]) or self._claims.failed(self._ids[position])

    def _inherit(self) -> list[int] | None:
        """A video whose holder is gone; None while that is not known of all."""
        for position, first in list(self._theirs.items()):
            id = self._ids[position]
            if self._claims.take(id):
                del self._theirs[position]
                return [position]
            sign = self._claims.sign(id)
            if self._ended(position) or (first and sign and sign != first):  # or its holder lives
                del self._theirs[position]
            else:
                self._theirs[position] = first or sign
        if not self._theirs:
            return []
        time.sleep(self._claims.pause_s)
        return None

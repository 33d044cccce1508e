"""Signs of life: how a rank that waits tells a peer that is slow from one that is gone."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI

from .errors import PeerLost

CHECK_S = 0.25  # between two looks at a peer's counter
ASK_AGAIN_S = 1.0  # when no answer came: a request from before a connection broke may never fail, a new one does
NAMING_S = 1.0  # for finding out which rank is gone, once a connection is broken
RESUME = "finished videos are whole, the same command resumes"


def array(memory: MPI.buffer, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """MPI's memory as numpy sees it, without a copy."""
    return np.frombuffer(memory, dtype)  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class Question:
    """A counter on its way here."""

    answer: np.ndarray
    request: MPI.Request
    since: float = field(default_factory=time.monotonic)


class Heartbeats:
    """A counter a rank, in memory that its host shares and the others can get."""

    def __init__(self, comm: MPI.Intracomm, host_comm: MPI.Intracomm, hosts: Sequence[int]) -> None:
        self._shared = MPI.Win.Allocate_shared(8, 8, comm=host_comm)
        self._shared.Lock_all()
        self._far = MPI.WIN_NULL
        if comm.size > host_comm.size:  # Open MPI has no such window for a rank that is alone
            self._far = MPI.Win.Create(self._shared.tomemory(), 8, comm=comm)
            self._far.Lock_all()
        self._own = array(self._shared.tomemory(), np.int64)
        self._own[0] = 0
        first = hosts.index(hosts[comm.rank])
        self._near = {first + i: array(self._shared.Shared_query(i)[0], np.int64) for i in range(host_comm.size)}
        # They outlive the watch that asked: MPI still writes into their memory.
        self._asked: dict[int, list[Question]] = {}
        self._asking = threading.Lock()  # the service thread may watch while the main thread does

    def beat(self) -> None:
        self._own[0] += 1
        self._shared.Sync()

    def watch(self, peers: Sequence[int], what: str, timeout_s: float) -> Iterator[None]:
        """Looks at the peers' counters at every `next`, but not more often than once in CHECK_S.

        Raises PeerLost when a counter has stood still for `timeout_s`, or cannot be read any more.
        """
        start = look = time.monotonic()
        seen: dict[int, tuple[int, float]] = {peer: (-1, start) for peer in peers}
        while True:
            if time.monotonic() >= look:
                self._look(seen, what, timeout_s)
                look = time.monotonic() + CHECK_S
            yield

    def _look(self, seen: dict[int, tuple[int, float]], what: str, timeout_s: float) -> None:
        self._shared.Sync()
        for peer in seen:
            try:
                value = self._read(peer)
            except MPI.Exception as error:
                reason = str(error).strip().splitlines()[-1].strip()  # the innermost of those that MPI gives
                raise PeerLost(f"rank {peer} is gone while waiting for {what} ({reason}); {RESUME}") from error
            if value is not None and value != seen[peer][0]:
                seen[peer] = value, time.monotonic()
            silent = time.monotonic() - seen[peer][1]
            if silent > timeout_s:
                raise PeerLost(
                    f"no sign of life from rank {peer} for {silent:.0f} s while waiting for {what}"
                    f" (transport.timeout_s={timeout_s:g}); {RESUME}"
                )

    def lost(self, error: MPI.Exception, peers: Sequence[int], what: str, timeout_s: float) -> Exception:
        """PeerLost, if MPI has failed because one of `peers` is gone; else MPI's error as it is."""
        if error.Get_error_class() != MPI.ERR_OTHER:  # not a broken connection but a mistake of the program
            return error
        end, watch = time.monotonic() + NAMING_S, self.watch(peers, what, timeout_s)
        try:
            while time.monotonic() < end:
                next(watch)
                time.sleep(CHECK_S / 10)
        except PeerLost as found:
            return found
        return error

    def _read(self, peer: int) -> int | None:
        """The peer's counter, or None while the answer is on its way."""
        if peer in self._near:
            return int(self._near[peer][0])
        with self._asking:
            asked = self._asked.get(peer, [])
            answered = [question for question in asked if question.request.Test()]
            self._asked[peer] = asked = [question for question in asked if question not in answered]
            if not asked or time.monotonic() - asked[-1].since > ASK_AGAIN_S:
                answer = np.empty(1, np.int64)
                asked.append(Question(answer, self._far.Rget(answer, peer)))
        return int(answered[-1].answer[0]) if answered else None

    def close(self) -> None:
        if self._far != MPI.WIN_NULL:
            self._far.Unlock_all()  # completes what was asked
            MPI.Request.Waitall([question.request for asked in self._asked.values() for question in asked])
            self._far.Free()
        self._shared.Unlock_all()
        self._shared.Free()

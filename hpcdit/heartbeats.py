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
ASK, ANSWER = 1, 2  # tags of messages without content
NOTHING = [bytearray(), MPI.BYTE]
RESUME = "finished videos are whole, the same command resumes"


def array(memory: MPI.buffer, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """MPI's memory as numpy sees it, without a copy."""
    return np.frombuffer(memory, dtype)  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class Question:
    """Whether a rank of another host lives."""

    requests: Sequence[MPI.Request]
    since: float = field(default_factory=time.monotonic)


class Heartbeats:
    """A counter a rank, in memory that its host shares; ranks of other hosts are asked, and count by their answers.

    By messages: one-sided communication between hosts is what not every MPI has, nor every network does by itself.
    """

    def __init__(self, comm: MPI.Intracomm, host_comm: MPI.Intracomm, hosts: Sequence[int]) -> None:
        self._shared = MPI.Win.Allocate_shared(8, 8, comm=host_comm)
        self._shared.Lock_all()
        self._comm = comm.Dup()
        self._own = array(self._shared.tomemory(), np.int64)
        self._own[0] = 0
        first = hosts.index(hosts[comm.rank])
        self._near = {first + i: array(self._shared.Shared_query(i)[0], np.int64) for i in range(host_comm.size)}
        # By rank. Questions outlive the watch that asked.
        self._asked: dict[int, list[Question]] = {}
        self._answers: dict[int, int] = {}
        self._asking = threading.Lock()  # the service thread may watch while the main thread does
        self._answering: list[MPI.Request] = []

    def beat(self) -> None:
        """To be called again and again, by a thread that lives as long as the rank; makes MPI's progress as well."""
        self._own[0] += 1
        self._shared.Sync()
        self._answering = [request for request in self._answering if not request.Test()]
        status = MPI.Status()
        while (message := self._comm.Improbe(tag=ASK, status=status)) is not None:
            message.Recv(NOTHING)
            self._answering.append(self._comm.Isend(NOTHING, status.source, ANSWER))

    def watch(self, peers: Sequence[int], what: str, timeout_s: float) -> Iterator[None]:
        """Looks at the peers' counters at every `next`, but not more often than once in CHECK_S.

        Raises PeerLost when a counter has stood still for `timeout_s`, or cannot be read any more.
        """
        seen: dict[int, tuple[int, float]] = {peer: (-1, 0.0) for peer in peers}
        last = time.monotonic() - CHECK_S
        while True:
            passed = time.monotonic() - last
            if passed >= CHECK_S:
                last += passed
                # When this process itself was paused (a suspended job or machine), the others may have been, too.
                self._look(seen, min(passed, 2 * CHECK_S), what, timeout_s)
            yield

    def _look(self, seen: dict[int, tuple[int, float]], passed: float, what: str, timeout_s: float) -> None:
        """seen: each peer's counter, and for how many seconds it has stood still."""
        self._shared.Sync()
        for peer in seen:
            try:
                value = self._read(peer)
            except MPI.Exception as error:
                reason = str(error).strip().splitlines()[-1].strip()  # the innermost of those that MPI gives
                raise PeerLost(f"rank {peer} is gone while waiting for {what} ({reason}); {RESUME}") from error
            before, silent = seen[peer]
            silent = silent + passed if value == before else 0.0
            seen[peer] = value, silent
            if silent > timeout_s:
                raise PeerLost(
                    f"no sign of life from rank {peer} for {silent:.0f} s while waiting for {what}"
                    f" (transport.timeout_s={timeout_s:g}); {RESUME}"
                )

    def lost(self, error: MPI.Exception, peers: Sequence[int], what: str, timeout_s: float) -> Exception:
        """PeerLost, if MPI has failed because one of `peers` is gone; else MPI's error as it is."""
        # Of several requests MPI says what went wrong in their statuses. Else it is a mistake of the program.
        if error.Get_error_class() not in (MPI.ERR_OTHER, MPI.ERR_IN_STATUS):
            return error
        end, watch = time.monotonic() + NAMING_S, self.watch(peers, what, timeout_s)
        try:
            while time.monotonic() < end:
                next(watch)
                time.sleep(CHECK_S / 10)
        except PeerLost as found:
            return found
        return error

    def _read(self, peer: int) -> int:
        """A number that grows as long as `peer` lives."""
        if peer in self._near:
            return int(self._near[peer][0])
        with self._asking:
            self._hear(peer)
            asked = self._asked.setdefault(peer, [])
            if not asked or time.monotonic() - asked[-1].since > ASK_AGAIN_S:
                requests = self._comm.Irecv(NOTHING, peer, ANSWER), self._comm.Isend(NOTHING, peer, ASK)
                asked.append(Question(requests))
            return self._answers.get(peer, 0)

    def _hear(self, peer: int) -> None:
        asked = self._asked.get(peer, [])
        answered = [question for question in asked if MPI.Request.Testall(question.requests)]
        self._asked[peer] = [question for question in asked if question not in answered]
        self._answers[peer] = self._answers.get(peer, 0) + len(answered)

    def settled(self) -> bool:
        """Whether all questions of this rank are answered."""
        with self._asking:
            for peer in self._asked:
                self._hear(peer)
            return not any(self._asked.values())

    def close(self) -> None:
        """Collective, when all ranks are settled and beat no more."""
        MPI.Request.Waitall(self._answering)
        self._comm.Free()
        self._shared.Unlock_all()
        self._shared.Free()

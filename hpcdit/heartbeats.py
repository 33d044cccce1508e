"""Signs of life: how a rank that waits tells a peer that is slow from one that is gone."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
from mpi4py import MPI

from .errors import PeerLost


def array(memory: MPI.buffer, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """MPI's memory as numpy sees it, without a copy."""
    return np.frombuffer(memory, dtype)  # type: ignore[call-overload]


class Heartbeats:
    """A counter a rank, in memory that its host shares and the others can get."""

    def __init__(self, comm: MPI.Intracomm, host_comm: MPI.Intracomm, hosts: Sequence[int]) -> None:
        self._shared = MPI.Win.Allocate_shared(8, 8, comm=host_comm)
        self._world = MPI.Win.Create(self._shared.tomemory(), 8, comm=comm)
        self._shared.Lock_all()
        self._world.Lock_all()
        self._own = array(self._shared.tomemory(), np.int64)
        self._own[0] = 0
        first = hosts.index(hosts[comm.rank])
        self._near = {first + i: array(self._shared.Shared_query(i)[0], np.int64) for i in range(host_comm.size)}

    def beat(self) -> None:
        self._own[0] += 1
        self._shared.Sync()

    def watch(self, peers: Sequence[int], what: str, timeout_s: float) -> Iterator[None]:
        """Looks at the peers' counters once a `next`; raises PeerLost when one has stood still for `timeout_s`."""
        start = time.monotonic()
        seen: dict[int, tuple[int, float]] = {peer: (-1, start) for peer in peers}
        asked: dict[int, tuple[np.ndarray, MPI.Request]] = {}
        while True:
            self._shared.Sync()
            for peer in seen:
                if (value := self._read(peer, asked)) is not None and value != seen[peer][0]:
                    seen[peer] = value, time.monotonic()
                silent = time.monotonic() - seen[peer][1]
                if silent > timeout_s:
                    raise PeerLost(
                        f"no sign of life from rank {peer} for {silent:.0f} s while waiting for {what}"
                        f" (transport.timeout_s={timeout_s:g}); finished videos are whole, the same command resumes"
                    )
            yield

    def _read(self, peer: int, asked: dict[int, tuple[np.ndarray, MPI.Request]]) -> int | None:
        """The peer's counter, or None while the answer is on its way."""
        if peer in self._near:
            return int(self._near[peer][0])
        if peer not in asked:
            into = np.empty(1, np.int64)
            asked[peer] = into, self._world.Rget(into, peer)
        into, request = asked[peer]
        if not request.Test():
            return None
        del asked[peer]
        return int(into[0])

    def close(self) -> None:
        for window in (self._world, self._shared):
            window.Unlock_all()
            window.Free()

"""Rank 0's desk: what groups of ranks, which never wait for each other, have to know of each other all the same.

Any rank sends notes to the desk, or asks and waits for the answer; rank 0's service thread takes them, so that nobody
waits for what rank 0 computes. The desk itself has one thing to say to all: a bell that rings once in a run. Small
messages alone, which every MPI and every network has.
"""

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from .group import Group
from .service import IDLE_S

NOTE, QUESTION, ANSWER, BELL = range(4)  # tags


class Desk:
    """Made and closed by all ranks of a world together; open from `open` on."""

    def __init__(self, world: Group) -> None:
        self._world = world
        with world.blocking("the desk"):
            self._comm = world.comm.Dup()
        self._take: Callable[[Any], Any] = lambda note: None
        self._taking, self._open = threading.RLock(), False
        self._rung = np.full(1, -1, np.int64)
        # What is under way, with the memory that it needs.
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []
        self._answers: list[tuple[MPI.Request, np.ndarray]] = []
        self._bell = self._comm.Irecv(self._rung, 0, BELL) if world.rank else MPI.REQUEST_NULL

    def open(self, answer: Callable[[Any], Any]) -> None:
        """answer: called on rank 0 with each note and each question, by one thread at a time; has to be quick."""
        if self._world.rank == 0:
            self._take, self._open = answer, True
            self._world.service.add(self._serve)

    def _serve(self) -> float:
        """Takes what has come, on the service thread of rank 0."""
        with self._taking:
            self._answers = [entry for entry in self._answers if not entry[0].Test()]
            status = MPI.Status()
            while self._open and (message := self._comm.Improbe(status=status)) is not None:
                content = np.empty(status.Get_count(MPI.BYTE), np.uint8)
                source, tag = status.source, status.tag
                message.Recv([content, MPI.BYTE])
                answer = self._take(json.loads(content.tobytes()))
                if tag == QUESTION:
                    data = _packed(answer)
                    self._answers.append((self._comm.Isend([data, MPI.BYTE], source, ANSWER), data))
        return IDLE_S

    def _send(self, note: Any, tag: int) -> None:
        data = _packed(note)
        with self._world.talking("the desk"):
            self._sent = [entry for entry in self._sent if not entry[0].Test()]
            # Synchronous: it has ended when rank 0 has the note, so that none is left over at the end.
            self._sent.append((self._comm.Issend([data, MPI.BYTE], 0, tag), data))

    def tell(self, note: Any) -> None:
        """Sends a note and does not wait."""
        if self._world.rank:
            self._send(note, NOTE)
        else:
            with self._taking:
                self._take(note)

    def ask(self, note: Any, what: str) -> Any:
        """Sends a question and waits for its answer."""
        if self._world.rank == 0:
            with self._taking:
                return self._take(note)
        self._send(note, QUESTION)
        status = MPI.Status()
        self._world.wait(lambda: self._comm.Iprobe(0, ANSWER, status), [0], what)
        content = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self._world.complete(lambda: self._comm.Irecv([content, MPI.BYTE], 0, ANSWER), [0], what)
        return json.loads(content.tobytes())

    def ring(self, value: int) -> None:
        """Rank 0 tells all ranks one number, 0 or more; only the first time counts."""
        with self._taking:
            if self._rung[0] < 0:
                self._rung[0] = value
                requests = [self._comm.Isend(self._rung, peer, BELL) for peer in range(1, self._world.size)]
                self._answers += [(request, self._rung) for request in requests]

    def rung(self) -> int:
        """What was rung, on every rank; -1 until then."""
        return int(self._rung[0]) if self._bell.Test() else -1

    def close(self) -> None:
        """Collective, when the bell has rung for all."""
        what = "the end of the desk"
        everyone = range(self._world.size)
        self._world.wait(lambda: self.rung() >= 0, everyone, what)
        self._world.wait(lambda: all([request.Test() for request, _ in self._sent]), [0], what)
        self._world.barrier(what)
        self._world.service.remove(self._serve)
        with self._taking:  # the service thread may not have heard yet
            self._open = False
        self._world.wait(lambda: all([request.Test() for request, _ in self._answers]), everyone, what)
        with self._world.blocking(what):
            self._comm.Free()


def _packed(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)

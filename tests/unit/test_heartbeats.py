"""Ranks of other hosts, of which this process plays one: who answers lives, who does not is named."""

import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from hpcdit.cluster import MPI
from hpcdit.errors import PeerLost
from hpcdit.heartbeats import Heartbeats

TIMEOUT_S = 0.6


@pytest.fixture
def far() -> Iterator[Heartbeats]:
    """A rank that is its own peer, as if it were on another host."""
    beats = Heartbeats(MPI.COMM_SELF, MPI.COMM_SELF, (0,))
    beats._near.clear()
    yield beats
    end = time.monotonic() + 5
    while not beats.settled():
        assert time.monotonic() < end, "questions without an answer"
        beats.beat()
    beats.close()


def look(beats: Heartbeats, seconds: float, beating: bool) -> None:
    watch, end = beats.watch([0], "a piece", TIMEOUT_S), time.monotonic() + seconds
    while time.monotonic() < end:
        next(watch)
        if beating:
            beats.beat()
        time.sleep(0.01)


def test_who_answers_lives_and_who_stops_is_named_after_the_timeout(far: Heartbeats) -> None:
    look(far, 2 * TIMEOUT_S, beating=True)
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"no sign of life from rank 0 .* while waiting for a piece"):
        look(far, 20, beating=False)
    assert TIMEOUT_S < time.monotonic() - start < TIMEOUT_S + 2


def test_a_pause_of_the_one_that_waits_is_no_silence_of_the_other(far: Heartbeats) -> None:
    watch = far.watch([0], "a piece", TIMEOUT_S)
    next(watch)
    time.sleep(2 * TIMEOUT_S)
    next(watch)


def test_questions_of_a_watch_that_was_given_up_are_still_answered(far: Heartbeats) -> None:
    look(far, 0.1, beating=False)
    assert not far.settled()
    look(far, 2 * TIMEOUT_S, beating=True)


class Broken:
    """A communicator whose connections are broken."""

    def Irecv(self, *args: object) -> NoReturn:
        raise MPI.Exception(MPI.ERR_OTHER)


@pytest.mark.parametrize("kind", [MPI.ERR_OTHER, MPI.ERR_IN_STATUS])
def test_an_error_of_mpi_names_the_rank_that_cannot_be_asked_any_more(
    kind: int, far: Heartbeats, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(far, "_comm", Broken())
        found = far.lost(MPI.Exception(kind), [0], "a piece", TIMEOUT_S)
    assert isinstance(found, PeerLost)
    assert str(found).startswith("rank 0 is gone while waiting for a piece (Other MPI error)")


def test_an_error_of_mpi_stays_what_it_is_where_nobody_is_gone(far: Heartbeats) -> None:
    mistake = MPI.Exception(MPI.ERR_TRUNCATE)
    assert far.lost(mistake, [0], "a piece", TIMEOUT_S) is mistake
    unknown = MPI.Exception(MPI.ERR_OTHER)
    assert far.lost(unknown, [0], "a piece", 60) is unknown

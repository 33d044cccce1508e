"""When a rank goes on after it has denoised a video."""

from contextlib import nullcontext
from pathlib import Path
from threading import Event, Timer, get_ident
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from hpcdit.errors import BrokenRun, VideoError
from hpcdit.output.trace import EVENT, Trace
from hpcdit.render.manifest import Job
from hpcdit.render.stages import Denoised, Finisher
from hpcdit.render.together import GivenUp


class Steps(Finisher):
    """Decodes and writes when it is told to."""

    def __init__(self, folder: Path, in_turn: bool) -> None:
        nothing = cast(Any, None)
        super().__init__(nothing, nothing, folder, nothing, Trace(0, 0), "none", None, 1, in_turn=in_turn)
        self.may_decode, self.may_write, self.fails = Event(), Event(), False

    def _decode(self, video: Denoised) -> np.ndarray:
        assert self.may_decode.wait(10)
        if self.fails:
            raise RuntimeError("no decoder")
        return np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)

    def _write(self, video: Denoised, frames: np.ndarray) -> None:
        assert self.may_write.wait(10)


class Decodes(Finisher):
    """Decodes by `fails`, the errors of one attempt after the other; notes the threads of both stages."""

    def __init__(self, folder: Path, in_turn: bool, *fails: Exception) -> None:
        adapter, device = SimpleNamespace(decode=self._frame), SimpleNamespace(stream=nullcontext)
        nothing, trace = cast(Any, None), Trace(0, 1)
        super().__init__(
            cast(Any, adapter), cast(Any, device), folder, nothing, trace, "none", None, 2, in_turn=in_turn
        )
        self.fails, self.decoding, self.writing, self.spans = list(fails), set[int](), list[tuple[int, int]](), [b""]

    def _frame(self, latents: torch.Tensor) -> np.ndarray:
        self.decoding.add(get_ident())
        if self.fails:
            raise self.fails.pop(0)
        return np.arange(6, dtype=np.uint8).reshape(1, 1, 2, 3)

    def _write(self, video: Denoised, frames: np.ndarray) -> None:
        self.writing.append((get_ident(), torch.get_num_threads()))
        self.spans = self._trace.take()["name"].tolist()


def video() -> Denoised:
    return Denoised(Job(0, "a", "", "", cast(Any, None)), {}, torch.zeros(1), np.empty(0, EVENT), 0.0)


@pytest.mark.parametrize("fails", [False, True])
def test_in_turn_a_rank_waits_for_the_decoder_and_not_for_the_file(tmp_path: Path, fails: bool) -> None:
    finisher = Steps(tmp_path, in_turn=True)
    finisher.fails = fails
    Timer(0.2, finisher.may_decode.set).start()
    finisher.submit(video())
    assert finisher.may_decode.is_set()
    if not fails:
        assert finisher.results() == []
    finisher.may_write.set()
    assert [result["status"] for result in finisher.results(wait=True)] == ["failed" if fails else "done"]


def test_otherwise_a_rank_goes_on_at_once(tmp_path: Path) -> None:
    finisher = Steps(tmp_path, in_turn=False)
    finisher.submit(video())
    assert finisher.results() == []
    finisher.may_decode.set()
    finisher.may_write.set()
    assert [result["status"] for result in finisher.results(wait=True)] == ["done"]


@pytest.mark.parametrize("in_turn", [True, False])
def test_in_turn_the_caller_decodes_and_the_thread_that_writes_has_no_others(tmp_path: Path, in_turn: bool) -> None:
    finisher = Decodes(tmp_path, in_turn, RuntimeError("not enough memory"))
    finisher.submit(video())
    assert [result["status"] for result in finisher.results(wait=True)] == ["done"]
    ((writer, threads),) = finisher.writing
    assert writer != get_ident()
    assert finisher.decoding == {get_ident() if in_turn else writer}
    assert threads == (1 if in_turn else 2)
    assert finisher.spans == [b"decode", b"decode"]  # once more: memory was short


ENDS: dict[str, tuple[list[Exception], str]] = {
    "not a video": ([VideoError("no numbers")], "no numbers"),
    "no decoder": ([RuntimeError("no decoder")], "while decoding and writing: RuntimeError: no decoder"),
    "no memory": ([MemoryError(), MemoryError()], "while decoding and writing: out of memory"),
    "given up": ([GivenUp("by another rank")], "by another rank"),
    "there": ([], "a.h5 appeared while it was rendered; kept as it is"),
}


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_a_video_that_cannot_be_decoded_fails_and_the_next_is_done(tmp_path: Path, end: str, in_turn: bool) -> None:
    fails, reason = ENDS[end]
    finisher = Decodes(tmp_path, in_turn, *fails)
    if end == "there":
        (tmp_path / "a.h5").touch()
    finisher.submit(video())
    (result,) = finisher.results(wait=True)
    assert (result["status"], result["reason"]) == ("failed", reason)
    (tmp_path / "a.h5").unlink(missing_ok=True)
    finisher.submit(video())
    assert [result["status"] for result in finisher.results(wait=True)] == ["done"]
    assert finisher.spans == [b"decode"]  # none of the video before


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize("error", [BrokenRun("a rank is gone"), OSError(28, "No space left on device")])
def test_what_ends_a_run_while_decoding_is_raised_with_the_results(
    tmp_path: Path, error: Exception, in_turn: bool
) -> None:
    finisher = Decodes(tmp_path, in_turn, error)
    finisher.submit(video())
    with pytest.raises(BrokenRun, match=r"a rank is gone|No space left"):
        finisher.results(wait=True)

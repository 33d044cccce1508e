"""When a rank goes on after it has denoised a video."""

from pathlib import Path
from threading import Event, Timer
from typing import Any, cast

import numpy as np
import pytest
import torch

from hpcdit.output.trace import EVENT, Trace
from hpcdit.render.manifest import Job
from hpcdit.render.stages import Denoised, Finisher


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

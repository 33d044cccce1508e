"""Stream memory operations are used where a try shows that they work, and nowhere else."""

import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpcdit.errors import BrokenRun
from hpcdit.transport import front_end
from hpcdit.transport.front_end import FrontEnd

DEVICE = torch.device("cuda", 0)


class Error(IntEnum):
    SUCCESS = 0
    NOT_SUPPORTED = 801


class Cuda:
    """Both of CUDA's interfaces, as far as they are used, over this process's memory; one stream."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeRelaxed=2)

    def __init__(self, refused: str = "", lost: bool = False, one_queue: bool = False) -> None:
        """one_queue: what stands on several streams of a graph is done in the order in which it was captured."""
        self.refused, self.lost, self.one_queue, self.stuck = refused, lost, one_queue, False
        self.calls: list[str] = []
        self.graph: list[Callable[[], None]] | None = None

    def _do(self, name: str, body: Callable[[], None]) -> tuple[Error]:
        self.calls.append(name + " in a graph" * (self.graph is not None))
        if self.calls[-1] == self.refused:
            return (Error.NOT_SUPPORTED,)
        if self.graph is None:
            body()
        else:
            self.graph.append(body)
        return (Error.SUCCESS,)

    def cuStreamWriteValue64(self, stream: int, address: int, value: int, flags: int) -> tuple[Error]:
        def body() -> None:
            if not self.lost:
                ctypes.c_int64.from_address(address).value = value

        return self._do("write", body)

    def cuStreamWaitValue64(self, stream: int, address: int, value: int, flags: int) -> tuple[Error]:
        def body() -> None:
            self.waits_for = address
            self.stuck = ctypes.c_int64.from_address(address).value < value

        return self._do("wait", body)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.graph = []
        return (Error.SUCCESS,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        found, self.graph = self.graph, None
        return Error.SUCCESS, found

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        return Error.SUCCESS, graph

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Error]:
        for body in graph if self.one_queue else reversed(graph):
            if not self.stuck:
                body()
        return (Error.SUCCESS,)

    def synchronize(self) -> None:
        """Of a stream: for ever, if it waits for what does not come."""
        assert not self.stuck or ctypes.c_int64.from_address(self.waits_for).value
        self.stuck = False

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Error]:
        return (Error.SUCCESS,)

    cudaGraphDestroy = cudaGraphExecDestroy


def works(monkeypatch: pytest.MonkeyPatch, cuda: Cuda, able: bool = True) -> bool:
    properties = SimpleNamespace(can_use_64_bit_stream_mem_ops=able)
    core = SimpleNamespace(Device=lambda index: SimpleNamespace(properties=properties))
    for name, module in (("cuda.core", core), ("cuda.bindings.driver", cuda), ("cuda.bindings.runtime", cuda)):
        monkeypatch.setitem(sys.modules, name, module)
    event = SimpleNamespace(record=lambda stream: None, query=lambda: not cuda.stuck)
    stream = SimpleNamespace(cuda_stream=7, wait_event=lambda event: None, synchronize=cuda.synchronize)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(front_end, "PROBE_S", 0)
    world: Any = SimpleNamespace(largest=lambda value, what: float(value))
    word = torch.full((1,), 5, dtype=torch.int64)
    return FrontEnd().works(world, DEVICE, word, word.data_ptr())


def test_they_are_tried_by_themselves_and_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    assert works(monkeypatch, cuda)
    assert cuda.calls[:4] == ["write", "wait", "write in a graph", "wait in a graph"]
    assert cuda.calls[4:] == ["wait in a graph", "write in a graph"], "and one beside the other"


@pytest.mark.parametrize("refused", ["write", "wait", "write in a graph", "wait in a graph"])
def test_one_that_cuda_refuses_is_enough_to_do_without(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(refused)
    assert not works(monkeypatch, cuda)
    assert cuda.calls[-1] == refused and cuda.graph is None, "no more is tried, and no capture is left open"


def test_a_value_that_does_not_arrive_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(lost=True)
    assert not works(monkeypatch, cuda)
    assert cuda.calls == ["write"]


def test_a_wait_that_holds_up_the_signal_beside_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(one_queue=True)
    assert not works(monkeypatch, cuda)
    assert not cuda.stuck


def test_a_device_without_them_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    assert not works(monkeypatch, cuda, able=False)
    assert cuda.calls == []


def test_an_error_of_cuda_is_named() -> None:
    with pytest.raises(BrokenRun, match="NOT_SUPPORTED"):
        front_end.checked((Error.NOT_SUPPORTED,))
    assert front_end.checked((Error.SUCCESS, 3)) == (3,)

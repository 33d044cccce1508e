"""Signals that a GPU's front end writes and waits for: stream memory operations of CUDA, which need no SM.

NVSHMEM waits on a stream by a kernel that spins unless the device can flush remote writes, which NVLink does not need:
a signal is written after its block in the order of a stream (CUDA driver API, cuStreamWriteValue64: a memory barrier
comes before the value), so whoever sees it sees the block.
"""

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..cluster import World
from ..errors import BrokenRun

PROBE_S = 2  # for a wait whose signal is there
WHAT = "a look at the GPUs' stream memory operations"


class FrontEnd:
    """Stream memory operations on this process's device. Raises BrokenRun where CUDA refuses one."""

    def __init__(self) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._runtime: Any = importlib.import_module("cuda.bindings.runtime")

    def write(self, address: int, stream: int) -> None:
        """Sets the word at `address`, own or a peer's, to 1 when all before it on `stream` is done."""
        checked(self._driver.cuStreamWriteValue64(stream, address, 1, 0))

    def wait(self, address: int, stream: int) -> None:
        """`stream` goes on when the own word at `address` is 1 or more."""
        checked(self._driver.cuStreamWaitValue64(stream, address, 1, 0))  # 0: greater or equal

    def works(self, world: World, device: torch.device, word: torch.Tensor, there: int) -> bool:
        """Whether all ranks' devices have them, by themselves and in a graph. Collective over the world.

        In a graph a wait on one stream may not hold up a signal on another, for which the peer waits.

        word: of symmetric memory, int64; there: the address of the same word of another rank, or of the own one where
        no other can be reached; each has its word written by one.
        """
        has = importlib.import_module("cuda.core").Device(device.index).properties.can_use_64_bit_stream_mem_ops
        stream, side = torch.cuda.Stream(device), torch.cuda.Stream(device)

        def clear() -> None:
            word.zero_()
            torch.cuda.synchronize(device)

        def written() -> None:
            if int(word) != 1:
                raise BrokenRun("what was written is not there")

        def beside() -> None:
            begun, written = torch.cuda.Event(), torch.cuda.Event()
            begun.record(stream)
            side.wait_event(begun)
            wait()
            self.write(there, side.cuda_stream)
            written.record(side)
            stream.wait_event(written)

        def crossed() -> None:
            try:
                self._as_graph(beside, stream)
            except BrokenRun:
                word.fill_(1)  # lets a stream go on that waits for what its peer cannot send
                stream.synchronize()
                raise

        write = partial(self.write, there, stream.cuda_stream)
        wait = partial(self.wait, word.data_ptr(), stream.cuda_stream)
        steps = list[Callable[[], object]]()
        for run in (self._at_once, self._as_graph):
            steps += [clear, partial(run, write, stream), written, partial(run, wait, stream)]
        steps += [clear, crossed]
        works = not world.largest(not has, WHAT)
        for step in steps:
            works = works and not world.largest(_fails(step), WHAT)  # no rank goes on before all have tried
        return works

    def _at_once(self, body: Callable[[], None], stream: torch.cuda.Stream) -> None:
        body()
        self._end(stream)

    def _as_graph(self, body: Callable[[], None], stream: torch.cuda.Stream) -> None:
        """By CUDA's own calls: a capture that fails leaves torch's graphs unfit for another."""
        cuda, handle = self._runtime, stream.cuda_stream
        checked(cuda.cudaStreamBeginCapture(handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
        try:
            body()
        finally:
            (graph,) = checked(cuda.cudaStreamEndCapture(handle))
        (ready,) = checked(cuda.cudaGraphInstantiate(graph, 0))
        checked(cuda.cudaGraphLaunch(ready, handle))
        self._end(stream)
        checked(cuda.cudaGraphExecDestroy(ready))
        checked(cuda.cudaGraphDestroy(graph))

    @staticmethod
    def _end(stream: torch.cuda.Stream) -> None:
        """Returns when all on `stream` is done, but does not wait for ever."""
        event, end = torch.cuda.Event(), time.monotonic() + PROBE_S
        event.record(stream)
        while not event.query():
            if time.monotonic() > end:
                raise BrokenRun("a stream memory operation does not end")


def _fails(step: Callable[[], object]) -> bool:
    try:
        step()
    except (BrokenRun, RuntimeError):  # the latter: a driver that is too old
        return True
    return False


def checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of CUDA returned besides its error. Raises BrokenRun for that."""
    error, *rest = result
    if int(error):
        raise BrokenRun(f"CUDA: {error.name}")
    return tuple(rest)

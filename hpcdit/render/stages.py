"""The last two stages of a video, decode and write, beside the denoising of the next one."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..device import Device
from ..errors import BrokenRun, VideoError
from ..group import FATAL
from ..kernels.vae import FastOnCpus
from ..models.base import Adapter
from ..output import catalog, media
from ..output.record import VideoRecord
from ..output.store import write_video
from ..output.summary import Summary
from ..output.trace import EVENT, Trace
from .decoding import RowDecoder, check_latents
from .manifest import Job
from .memory import release
from .together import GivenUp, short_of_memory, told

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """How a video ended. status: done or failed, then with a reason; seconds from its encoding to its file."""

    id: str
    status: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Denoised:
    """A video that is still to be decoded. started: this process's `time.perf_counter()` when its encoding began;
    plan: how its denoising was shared out; latents: all, or this rank's rows; owner: the rank that writes it."""

    job: Job
    plan: dict[str, Any]
    latents: torch.Tensor
    events: np.ndarray
    started: float
    owner: int = 0


def check_picture(frames: np.ndarray) -> None:
    """Raises VideoError for a stack of frames without any variation: that is never what was asked for."""
    if (frames == frames.flat[0]).all():
        raise VideoError(f"the frames show nothing: every value is {frames.flat[0]}")


def done_now(body: Callable[[], T]) -> Callable[[], T]:
    """Calls `body`; what comes of it, a value or an error, comes when what this returns is called."""
    end = Future[T]()
    try:
        end.set_result(body())
    except Exception as error:
        end.set_exception(error.with_traceback(None))  # which would hold on to all that was computed
    return end.result


class Finisher:
    """Decodes and writes this rank's share of the videos, one after the other; writes on a thread of its own.

    At most one video waits while another is worked on, so that memory stays bounded.
    """

    def __init__(
        self,
        adapter: Adapter,
        device: Device,
        folder: Path,
        record: Callable[[Job, dict[str, Any]], VideoRecord],
        trace: Trace,
        compression: str,
        film: media.Encoder | None,
        threads: int,
        shared: bool = False,
        unknown_s: float = 0.0,
        rows: RowDecoder | None = None,
        in_turn: bool = False,
    ) -> None:
        """film: what makes MP4 files, where they are wanted; shared: other runs write into `folder`, too;
        unknown_s: what the first video is expected to take here.

        rows: where all ranks of the group decode each video together; the owner writes it. in_turn: the caller decodes
        a video, and goes on while it is written; else that is done on the thread, too.
        """
        self.rows, self._in_turn = rows, in_turn
        self._unknown_s = unknown_s
        self._adapter, self._device = adapter, device
        self._folder, self._record, self._trace = folder, record, trace
        self._compression, self._film, self._shared = compression, film, shared
        # A new thread would take all cores otherwise: OpenMP's thread count is a thread's own setting. While there are
        # more of its threads than cores, all sleep at once when they wait: what does not decode has none beside it.
        own = 1 if in_turn else threads
        self._pool = ThreadPoolExecutor(1, "hpcdit-finisher", torch.set_num_threads, (own,))
        self._running: list[Future[Result | None]] = []
        self._each_s: float | None = (
            None  # what decode and write took of the last video, for each number of its latents
        )

    def submit(self, video: Denoised) -> None:
        """Queues a video; waits while one is queued already, in turn while one is written."""
        for earlier in self._running if self._in_turn else self._running[:-1]:
            earlier.exception()
        decode = partial(self._timed, video)
        self._running.append(self._pool.submit(self._finish, video, done_now(decode) if self._in_turn else decode))

    def expected_s(self, numbers: int) -> float:
        """What decode and write of so many numbers of latents will take."""
        return self._unknown_s if self._each_s is None else self._each_s * numbers

    def results(self, wait: bool = False) -> list[dict]:
        """What has ended since the last call, all of it if `wait`. Raises what the thread raised."""
        ended = [future for future in self._running if wait or future.done()]
        self._running = [future for future in self._running if future not in ended]
        return [asdict(result) for future in ended if (result := future.result())]

    def _timed(self, video: Denoised) -> tuple[np.ndarray | None, float]:
        """The frames, where this rank is to write them, and the seconds that decoding took."""
        start = time.perf_counter()
        there = os.path.lexists(self._folder / f"{video.job.id}.h5")
        if self.rows.agreed(there, video.owner) if self.rows else there:
            raise FileExistsError
        return self._decode(video), time.perf_counter() - start

    def _finish(self, video: Denoised, decode: Callable[[], tuple[np.ndarray | None, float]]) -> Result | None:
        """How it ended; None where another rank of the group says so."""
        job, done = video.job, Result(video.job.id, "done", 0.0)
        try:
            frames, decode_s = decode()
            start = time.perf_counter()
            events = self.rows.events(video.owner) if self.rows else np.empty(0, EVENT)
            if frames is not None:
                check_picture(frames)
                self._write(replace(video, events=np.concatenate([video.events, events])), frames)
            self._each_s = (decode_s + time.perf_counter() - start) / video.latents.numel()
        except FATAL:
            raise
        except (VideoError, GivenUp) as error:
            reason = error.reason if isinstance(error, GivenUp) else str(error)
            done = replace(done, status="failed", reason=reason)
        except FileExistsError:
            # Of runs that share the folder, one that was suspended may have lost its claim.
            status, reason = "done" if self._shared else "failed", f"{job.id}.h5 appeared while it was rendered"
            done = replace(done, status=status, reason=f"{reason}; kept as it is")
        except OSError as error:  # a full disk, a file system that is gone: no later video would fare better
            where = self._folder / f"{job.id}.h5"
            why = f"{where} cannot be written: {error.strerror or error}"
            raise BrokenRun(f"{why}; finished videos are whole, the same command resumes") from error
        except Exception as error:
            done = replace(done, status="failed", reason=f"while decoding and writing: {told(error)}")
        self._trace.take()  # nothing is left, unless the video has no file
        if self.rows and self.rows.group.rank != video.owner:
            return None
        return replace(done, seconds=time.perf_counter() - video.started)

    def _decode(self, video: Denoised) -> np.ndarray | None:
        """The frames, where this rank is to write them; if memory was short, once more without what nobody needs."""
        for last in (False, True):
            try:
                return self._frames(video)
            except Exception as error:
                if last or not (error.memory if isinstance(error, GivenUp) else short_of_memory(error)):
                    raise
            release()
        raise AssertionError

    def _frames(self, video: Denoised) -> np.ndarray | None:
        if self.rows:
            return self.rows(video.latents, video.owner, video.job.sampling)
        check_latents(video.latents)
        with self._trace.span("decode", "compute"), self._device.stream(), FastOnCpus():
            return self._adapter.decode(video.latents)

    def _write(self, video: Denoised, frames: np.ndarray) -> None:
        start, every = self._trace.now(), video.events

        def events() -> np.ndarray:
            nonlocal every
            self._trace.record("write", "io", start, self._trace.now(), frames.nbytes)
            every = np.concatenate([video.events, self._trace.take()])
            every = every[np.argsort(every["start"], kind="stable")]
            return every

        path = self._folder / f"{video.job.id}.h5"
        if self._film:  # first: the HDF5 file says that the video is done
            media.write_mp4(path.with_suffix(".mp4"), frames, video.job.sampling.fps, self._film)
        record = self._record(video.job, video.plan)
        write_video(path, frames, record, events, self._compression)
        summary = Summary.of(frames[len(frames) // 2], len(frames), every, record.plan)
        catalog.note(path, record, time.perf_counter() - video.started, summary)

    def close(self) -> None:
        self._pool.shutdown()

"""One video decoded by all ranks of a group, each the rows of the frames that it holds."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..config import Sampling
from ..device import Device
from ..errors import VideoError
from ..group import FATAL, Group
from ..mesh import cut
from ..models.base import Adapter
from ..models.rows import ByRows
from ..output.trace import EVENT, Trace
from ..transport.rows import Line, PeerGaveUp, RowGroup
from .groups import Groups
from .together import Failure, Together


def by_rows(choice: str, possible: bool, ranks: int, videos: int, cuda: bool = False) -> bool:
    """Whether a group of so many ranks decodes its videos together: `parallel.vae`.

    possible: for the model; videos: that the group is to render; cuda: it has GPUs. Where every rank has a video to
    decode while the next one is denoised, all that a cut adds is messages; where some would have none, the last video
    is done sooner. Rows of GPUs' frames go through the hosts' memory, so there they are cut only if asked for.
    """
    return possible and ranks > 1 and (choice == "rows" or (choice == "auto" and videos < ranks and not cuda))


def check_latents(latents: torch.Tensor) -> None:
    """Raises VideoError where one is not a number."""
    if not torch.isfinite(latents).all():
        raise VideoError("the latents hold values that are not numbers")


@dataclass
class RowDecoder:
    """Decodes on the ranks of a group together, on a thread of each: all decode the same videos in the same order.

    group: with a communicator of its own.
    """

    group: Group
    adapter: Adapter
    device: Device
    trace: Trace
    _line: Line = field(init=False)
    _together: Together = field(init=False)

    def __post_init__(self) -> None:
        self._line = Line(self.group)
        self._together = Together(self.group, lambda: math.inf, lambda text: None)

    def share(self, latents: torch.Tensor) -> torch.Tensor:
        """What of a video's latents, [1, C, f, h, w], this rank needs: [1, C, f, rows, w]."""
        parts = cut(latents.shape[3], min(self.group.size, latents.shape[3]))
        mine = parts[self.group.rank] if self.group.rank < len(parts) else range(0)
        return latents[:, :, :, mine.start : mine.stop]

    def agreed(self, value: Any, owner: int) -> Any:
        """`value` of the rank `owner`, on all ranks."""
        return self.group.broadcast(value, "a video to decode", owner)

    def __call__(self, latents: torch.Tensor, owner: int, sampling: Sampling) -> np.ndarray | None:
        """The frames, uint8 [F, H, W, 3], on rank `owner`; None elsewhere.

        latents: what `share` gave. Raises GivenUp, on all ranks, if any cannot go on.
        """
        shape = sampling.num_frames, sampling.height, sampling.width, 3
        rows, whole = RowGroup(self._line, self.adapter.shape.latents(*shape[:3])[2]), None
        failure: Failure | None = None
        try:
            frames = self._rows(latents, rows) if rows.mine else None
            whole = rows.collect(frames, owner, shape)
        except FATAL:
            raise
        except PeerGaveUp:
            pass  # whose failure is agreed on
        except Exception as error:
            failure = self._together.failure(error, "while decoding")
            self._line.give_up()
        try:
            self._together.agree(failure)
        except Exception:
            self._line.settle()
            raise
        return whole

    def _rows(self, latents: torch.Tensor, rows: RowGroup) -> np.ndarray:
        check_latents(latents)
        with self.trace.span("decode", "compute"), self.device.stream(), ByRows(rows):
            return self.adapter.decode(latents)

    def events(self, owner: int) -> np.ndarray:
        """What all ranks have recorded of the video, on rank `owner`."""
        gathered = self.group.gather(self.trace.take().tobytes(), owner, "the events of a video")
        return np.frombuffer(b"".join(gathered), EVENT)

    def close(self) -> None:
        """Collective over the group."""
        self.group.close()


def row_decoder(
    choice: str, groups: Groups, videos: int, adapter: Adapter, device: Device, trace: Trace
) -> RowDecoder | None:
    """Where all ranks of a group decode a video together, see `by_rows`. videos: of the run. Collective."""
    share = -(-videos // groups.mesh.extent("replicas"))
    if not by_rows(choice, adapter.by_rows, groups.replica.size, share, device.cuda):
        return None
    return RowDecoder(groups.replica.part(1), adapter, device, trace)

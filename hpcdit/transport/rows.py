"""Ranks that hold the rows of one video talk to each other: a `models.rows.Rows` over messages of MPI.

Not through an `Exchange`: each layer of a VAE has sizes of its own, and symmetric memory for all of them would cost
what the cut saves. Waits are polled, like all of a `Group`, so that a rank that is lost is noticed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from mpi4py import MPI

from ..group import Group
from ..mesh import cut

DATA, GIVES_UP = 1, 2  # tags
WHAT = "rows of a video"
NOTHING = [bytearray(), MPI.BYTE]

Tensors = dict[int, torch.Tensor]  # by rank


class PeerGaveUp(Exception):
    """Another rank cannot go on: what this one waits for may never come. All ranks have to `settle`."""


class Line:
    """Messages between the ranks of a group, any of which may give up in the middle.

    group: with a communicator of its own, which one thread of a rank uses.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._forget()

    def _forget(self) -> None:
        self._sent, self._received = (np.zeros(self.group.size, np.int64) for _ in range(2))
        self._gave_up = False
        # Of a swap that was left: sends, with what they read, and receives.
        self._leaving, self._held, self._coming = list[MPI.Request](), Tensors(), dict[int, MPI.Request]()

    def swap(self, send: Mapping[int, torch.Tensor], into: Mapping[int, torch.Tensor]) -> Tensors:
        """Sends to ranks, and returns what comes from ranks, of the shapes of `into`. Raises PeerGaveUp, PeerLost."""
        out = {rank: x.detach().cpu().contiguous() for rank, x in send.items() if x.numel()}
        come = {rank: torch.empty(x.shape, dtype=x.dtype) for rank, x in into.items()}
        comm = self.group.comm
        with self.group.talking(WHAT):
            coming = {rank: comm.Irecv(_bytes(x), rank, DATA) for rank, x in come.items() if x.numel()}
            leaving = [comm.Isend(_bytes(x), rank, DATA) for rank, x in out.items()]
        self._leaving, self._held, self._coming = leaving, {**out}, coming
        for rank in out:
            self._sent[rank] += 1
        requests = [*coming.values(), *leaving]
        ended = False

        def done() -> bool:
            nonlocal ended
            ended = MPI.Request.Testall(requests)
            return ended or comm.Iprobe(MPI.ANY_SOURCE, GIVES_UP)

        self.group.wait(done, sorted({*coming, *out}), WHAT)
        if not ended:
            raise PeerGaveUp
        for rank in coming:
            self._received[rank] += 1
        self._leaving, self._held, self._coming = [], {}, {}
        return {rank: come[rank].to(x.device) for rank, x in into.items()}

    def give_up(self) -> None:
        """Tells all other ranks that this one does not go on."""
        self._gave_up = True
        with self.group.talking(WHAT):
            others = (rank for rank in range(self.group.size) if rank != self.group.rank)
            self._leaving += [self.group.comm.Isend(NOTHING, rank, GIVES_UP) for rank in others]

    def settle(self) -> None:
        """Takes what is still under way, so that the next video finds nothing of this one. Collective."""
        comm, everyone = self.group.comm, range(self.group.size)
        status = MPI.Status()
        for rank, request in self._coming.items():
            request.Cancel()
            self.group.wait(lambda r=request: r.Test(status), [rank], WHAT)  # type: ignore[misc]
            self._received[rank] += not status.Is_cancelled()
        mine = np.stack([self._sent, np.full_like(self._sent, self._gave_up)], 1)
        theirs = np.empty_like(mine)
        self.group.complete(lambda: comm.Ialltoall(mine, theirs), everyone, WHAT)
        for rank in everyone:
            for tag, count in ((DATA, theirs[rank, 0] - self._received[rank]), (GIVES_UP, theirs[rank, 1])):
                for _ in range(int(count) if rank != self.group.rank else 0):
                    self._take(rank, tag)
        self.group.wait(lambda: MPI.Request.Testall(self._leaving), everyone, WHAT)
        self._forget()

    def _take(self, rank: int, tag: int) -> None:
        found: MPI.Message | None = None
        status = MPI.Status()

        def there() -> bool:
            nonlocal found
            found = self.group.comm.Improbe(rank, tag, status)
            return found is not None

        self.group.wait(there, [rank], WHAT)
        assert found is not None
        found.Recv([bytearray(status.Get_count(MPI.BYTE)), MPI.BYTE])


@dataclass
class RowGroup:
    """One video of `height` rows of latents on the ranks of a line; ranks beyond the rows have none."""

    line: Line
    height: int
    cut: tuple[range, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.cut = cut(self.height, min(self.line.group.size, self.height))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.cut))

    @property
    def mine(self) -> range:
        rank = self.line.group.rank
        return self.cut[rank] if rank < len(self.cut) else range(0)

    def halos(self, x: torch.Tensor, above: int, below: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rank, send, into = self.line.group.rank, Tensors(), Tensors()
        if rank > 0:
            send[rank - 1], into[rank - 1] = x[..., :below, :], x.new_empty(*x.shape[:-2], above, x.shape[-1])
        if rank < len(self.cut) - 1:
            send[rank + 1] = x[..., x.shape[-2] - above :, :]
            into[rank + 1] = x.new_empty(*x.shape[:-2], below, x.shape[-1])
        found = self.line.swap(send, into)
        return found.get(rank - 1), found.get(rank + 1)

    def gather(self, x: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> list[torch.Tensor]:
        others = [rank for rank in range(len(self.cut)) if rank != self.line.group.rank]
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        found = self.line.swap(dict.fromkeys(others, x), {rank: x.new_empty(shapes[rank]) for rank in others})
        return [found.get(rank, x) for rank in range(len(self.cut))]

    def collect(self, frames: np.ndarray | None, owner: int, shape: Sequence[int]) -> np.ndarray | None:
        """The whole video on `owner`, uint8 [F, H, W, 3] of `shape`; None elsewhere. Collective over the line.

        frames: this rank's rows of it, [F, h, W, 3], where it has some.
        """
        rank, scale = self.line.group.rank, shape[1] // self.height
        if rank != owner:
            self.line.swap({} if frames is None else {owner: torch.from_numpy(frames)}, {})
            return None
        whole = np.empty(shape, np.uint8)
        for other, rows in enumerate(self.cut):  # one after the other: no second copy of the whole
            part = frames
            if other != rank:
                like = torch.empty(shape[0], len(rows) * scale, *shape[2:], dtype=torch.uint8)
                part = self.line.swap({}, {other: like})[other].numpy()
            assert part is not None
            whole[:, rows.start * scale : rows.stop * scale] = part
        return whole


def _bytes(x: torch.Tensor) -> np.ndarray:
    """A contiguous tensor of the CPU, as MPI takes it."""
    flat: np.ndarray = x.reshape(-1).view(torch.uint8).numpy()
    return flat

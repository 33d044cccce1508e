"""What the executor asks of the device: one protocol, a module for each kind of device."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Norm = tuple[torch.Tensor, float]  # weight [H * D] of an RMS norm over all heads of a token, and its epsilon
Tables = tuple[torch.Tensor, torch.Tensor]  # of a rotary embedding: cos and sin, [tokens, 1, D / 2]
Blocks = Sequence[tuple[range, torch.Tensor]]  # heads, and where they go: [tokens, B, heads, D]
Partial = tuple[torch.Tensor, torch.Tensor]  # out and log-sum-exp, of some of the keys
# As `attend`, of q, k, v and how many keys of each video count, int32 [B] on the device: the first ones.
AttendFirst = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Partial]


class Kernels(Protocol):
    """See `kernels.cpu` for the meaning of each."""

    LEAST_PART: int

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial: ...

    def attend_first(self, dtype: torch.dtype, dim: int) -> AttendFirst | None: ...

    def merge(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        new_out: torch.Tensor,
        new_lse: torch.Tensor,
        into: torch.Tensor | None = None,
    ) -> Partial: ...

    def embed(self, x: torch.Tensor, norm: Norm | None, tables: Tables | None, blocks: Blocks) -> None: ...

    def to_uint8(self, frames: torch.Tensor) -> torch.Tensor: ...


class Counted:
    """Which keys count, for each video of a batch: worked out once for all layers of a pass."""

    def __init__(self, counts: torch.Tensor) -> None:
        """counts: [B, L], of type bool."""
        self._counts, self._host = counts, counts
        self._first: dict[tuple[range, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._places: dict[tuple[range, ...], list[torch.Tensor | None]] = {}

    def first(self, parts: Sequence[range]) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys of these tokens, side by side, with those that count first, int64 [B, n], and how many these are,
        int32 [B]: without asking the device for anything."""
        parts = tuple(parts)
        if parts not in self._first:
            rows = self._rows(self._counts, parts)
            order = torch.sort((~rows).to(torch.uint8), dim=1, stable=True).indices
            self._first[parts] = order, rows.sum(1, dtype=torch.int32)
        return self._first[parts]

    def places(self, parts: Sequence[range]) -> list[torch.Tensor | None]:
        """For each video, those that count, int64 [n]; None where all do. The host waits for the device once."""
        parts = tuple(parts)
        if parts not in self._places:
            self._host = self._host.cpu()
            device = self._counts.device
            rows = self._rows(self._host, parts)
            self._places[parts] = [None if row.all() else row.nonzero()[:, 0].to(device) for row in rows]
        return self._places[parts]

    def _rows(self, counts: torch.Tensor, parts: Sequence[range]) -> torch.Tensor:
        return torch.cat([counts[:, part.start : part.stop] for part in parts], dim=1)


def attend_counted(
    kernels: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counted: Counted, parts: Sequence[range]
) -> Partial:
    """As `kernels.attend`, to those keys that count; parts: the tokens that k and v are of."""
    if attend_first := kernels.attend_first(q.dtype, q.shape[3]):
        order, count = counted.first(parts)
        k, v = (_side_by_side([_keys(x, b, row) for b, row in enumerate(order)]) for x in (k, v))
        return attend_first(q, k, v, count)
    places = counted.places(parts)
    if all(place is None for place in places):
        return kernels.attend(q, k, v)
    found = [kernels.attend(q[:, b : b + 1], _keys(k, b, at), _keys(v, b, at)) for b, at in enumerate(places)]
    out, lse = zip(*found, strict=True)
    return _side_by_side(out), _side_by_side(lse)


def _side_by_side(videos: Sequence[torch.Tensor]) -> torch.Tensor:
    """[tokens, 1, ...] of each, as [tokens, B, ...]."""
    return videos[0] if len(videos) == 1 else torch.cat(tuple(videos), 1)


def _keys(x: torch.Tensor, video: int, place: torch.Tensor | None) -> torch.Tensor:
    x = x[:, video : video + 1]
    return x if place is None else x.index_select(0, place)

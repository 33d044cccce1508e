"""Laws of frames that are cut into rows: what the ranks make of their rows is what one rank makes of all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcdit.mesh import cut
from hpcdit.models.rows import ByRows, cuttable
from hpcdit.render.decoding import by_rows
from tests.vaes import make


@dataclass
class Threads:
    """A rank of several that are threads of this process, as a `models.rows.Rows`."""

    parts: tuple[range, ...]
    rank: int
    ways: dict[tuple[int, int], "Queue[Tensor]"]
    mine: range = field(init=False)
    counts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.mine, self.counts = self.parts[self.rank], tuple(map(len, self.parts))

    def _get(self, rank: int) -> Tensor:
        return self.ways[rank, self.rank].get(timeout=20)

    def halos(self, x: Tensor, above: int, below: int) -> tuple[Tensor | None, Tensor | None]:
        up, down = self.rank - 1, self.rank + 1
        if up >= 0:
            self.ways[self.rank, up].put(x[..., :below, :].clone())
        if down < len(self.parts):
            self.ways[self.rank, down].put(x[..., x.shape[-2] - above :, :].clone())
        return (self._get(up) if up >= 0 else None, self._get(down) if down < len(self.parts) else None)

    def gather(self, x: Tensor, dim: int, sizes: tuple[int, ...]) -> list[Tensor]:
        others = [rank for rank in range(len(self.parts)) if rank != self.rank]
        for rank in others:
            self.ways[self.rank, rank].put(x)
        found = [x if rank == self.rank else self._get(rank) for rank in range(len(self.parts))]
        assert [part.shape[dim] for part in found] == list(sizes)
        return found


def together(parts: tuple[range, ...], body: Callable[[Threads], Tensor]) -> list[Tensor]:
    """What `body` returns for the rows of each rank, all ranks at the same time."""
    ranks = range(len(parts))
    ways: dict[tuple[int, int], Queue[Tensor]] = {(a, b): Queue() for a in ranks for b in ranks}
    found: dict[int, Any] = {}

    def start(rank: int) -> None:
        rows = Threads(parts, rank, ways)
        try:
            with ByRows(rows):
                found[rank] = body(rows)
        except Exception as error:
            found[rank] = error

    threads = [Thread(target=start, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[rank] for rank in ranks]


def rows_of(x: Tensor, rows: range, scale: int = 1) -> Tensor:
    return x[..., rows.start * scale : rows.stop * scale, :]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


heights = st.integers(1, 9)
ranks = st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(heights, ranks, st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, 5]), st.sampled_from([2, 3]), st.booleans())
@pytest.mark.parametrize("mode", ["conv", "constant", "replicate"])
def test_a_convolution_of_rows_is_that_of_the_frame(
    mode: str, height: int, count: int, scale: int, kernel: int, dims: int, halve: bool
) -> None:
    """With the padding inside the convolution, or before it by any mode; with and without a stride of 2.

    A frame that is shorter than the halo on some rank is refused: no neighbour has that many rows.
    """
    parts, halo = cut(height, min(count, height)), kernel // 2
    stride = 2 if halve and scale > 1 else 1
    x = drawn(1, 2, *([3] * (dims - 2)), height * scale, 6)
    weight = drawn(3, 2, *([kernel] * dims), seed=1)
    conv = {2: F.conv2d, 3: F.conv3d}[dims]
    pads = [halo] * (2 * dims)

    def compute(x: Tensor) -> Tensor:
        if mode == "conv":
            return conv(x, weight, None, (1,) * (dims - 2) + (stride,) * 2, (halo,) * dims)
        return conv(F.pad(x, pads, mode, *([0.5] if mode == "constant" else [])), weight, None, stride)

    if halo > min(map(len, parts)) * scale:
        with pytest.raises(ValueError, match="taller"):
            together(parts, lambda rows: compute(rows_of(x, rows.mine, scale)))
        return
    found = together(parts, lambda rows: compute(rows_of(x, rows.mine, scale)))
    assert torch.allclose(torch.cat(found, -2), compute(x), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(heights, ranks, st.sampled_from([1, 2]))
def test_the_padding_below_that_halves_a_frame_takes_the_next_rows(height: int, count: int, scale: int) -> None:
    """As Wan and CogVideoX encode: one row of zeros below, a stride of 2 and no padding."""
    parts, scale = cut(height, min(count, height)), 2 * scale
    x, weight = drawn(1, 2, height * scale, 6), drawn(3, 2, 3, 3, seed=1)

    def compute(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)

    found = together(parts, lambda rows: compute(rows_of(x, rows.mine, scale)))
    assert torch.allclose(torch.cat(found, -2), compute(x), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(heights, ranks, st.booleans(), st.sampled_from([0.0, 1e4]))
def test_a_group_norm_of_rows_has_the_moments_of_the_frame(
    height: int, count: int, affine: bool, offset: float
) -> None:
    parts = cut(height, min(count, height))
    x = drawn(2, 6, 3, height * 2, 5) + offset
    weight, bias = (drawn(6, seed=1), drawn(6, seed=2)) if affine else (None, None)

    def compute(x: Tensor) -> Tensor:
        return F.group_norm(x, 3, weight, bias, 1e-6)

    found = together(parts, lambda rows: compute(rows_of(x, rows.mine, 2)))
    assert torch.allclose(torch.cat(found, -2), compute(x), rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(heights, ranks, st.integers(1, 3), st.booleans())
def test_attention_of_rows_sees_every_token_that_the_mask_allows(
    height: int, count: int, frames: int, causal: bool
) -> None:
    """Tokens of frames one after the other, of which each sees itself and those before, as HunyuanVideo's; or all."""
    parts, width = cut(height, min(count, height)), 2
    q, k, v = (drawn(1, 2, frames, height, width, 4, seed=seed) for seed in range(3))

    def compute(rows: range) -> Tensor:
        mine = (x[:, :, :, rows.start : rows.stop].flatten(2, 4) for x in (q, k, v))
        frame = torch.arange(frames).repeat_interleave(len(rows) * width)
        mask = torch.where(frame[:, None] >= frame, 0.0, -torch.inf).double()[None, None] if causal else None
        out: Tensor = F.scaled_dot_product_attention(next(mine), next(mine), next(mine), mask)
        return out.unflatten(2, (frames, len(rows), width))

    found = together(parts, lambda rows: compute(rows.mine))
    assert torch.allclose(torch.cat(found, 3), compute(range(height)), rtol=0, atol=1e-12)


@given(heights, ranks)
def test_noise_of_rows_is_that_of_the_frame(height: int, count: int) -> None:
    parts = cut(height, min(count, height))

    def draw(rows: range) -> Tensor:
        return torch.randn((len(rows) * 2, 3), generator=torch.Generator().manual_seed(5))

    assert torch.equal(torch.cat(together(parts, lambda rows: draw(rows.mine))), draw(range(height)))


def test_a_vae_that_works_in_tiles_is_not_cut() -> None:
    vae = make("hunyuan")
    assert cuttable(vae)
    vae.enable_tiling()
    assert not cuttable(vae)
    assert not cuttable(torch.nn.Identity())


def test_videos_are_decoded_by_rows_where_ranks_would_have_none() -> None:
    assert by_rows("auto", True, ranks=4, videos=3) and not by_rows("auto", True, ranks=4, videos=4)
    assert by_rows("rows", True, ranks=2, videos=100) and not by_rows("whole", True, ranks=4, videos=1)
    assert not by_rows("rows", True, ranks=1, videos=1) and not by_rows("rows", False, ranks=4, videos=1)

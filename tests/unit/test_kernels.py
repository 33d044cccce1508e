"""The device's kernels against torch's own attention in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.kernels import cpu
from hpcdit.kernels.base import AttendFirst, Counted, Partial, attend_counted
from hpcdit.kernels.vae import FastOnCpus
from tests.asked import Asked


def problem(lq: int, lk: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(lq, 2, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, lk, 2, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.permute(2, 0, 1, 3), torch.logsumexp(scores, -1).permute(2, 0, 1)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_attention_and_lse_equal_torch_for_any_size(
    dtype: torch.dtype, tolerance: float, lq: int, lk: int, heads: int, dim: int, seed: int
) -> None:
    q, k, v = problem(lq, lk, heads, dim, dtype, seed)
    out, lse = cpu.attend(q, k, v)
    expected, expected_lse = reference(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype
    assert (out.double() - expected).abs().max() < tolerance
    assert (lse.double() - expected_lse).abs().max() < tolerance


class Counting:
    """Kernels with attention that takes a number of keys, as FlashAttention 3 does."""

    def attend_first(self, dtype: torch.dtype, dim: int) -> AttendFirst:
        return self._attend

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: torch.Tensor) -> Partial:
        assert count.dtype == torch.int32 and count.shape == (q.shape[1],)
        found = [cpu.attend(q[:, b : b + 1], k[:n, b : b + 1], v[:n, b : b + 1]) for b, n in enumerate(count.tolist())]
        return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)


@pytest.mark.parametrize("kernels", [cpu, Counting()], ids=["host", "device"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.integers(0, 99), st.data())
def test_keys_that_do_not_count_are_left_out(kernels: Any, sizes: list[int], seed: int, data: st.DataObject) -> None:
    """Whatever part of the sequence the keys are of; where none counts, a merge takes nothing from there."""
    total = sum(sizes) + 5
    counts = torch.tensor([data.draw(st.lists(st.booleans(), min_size=total, max_size=total)) for _ in range(2)])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [range(2 + end - size, 2 + end) for size, end in zip(sizes, ends, strict=True)][::-1]
    q, k, v = problem(7, total, 3, 8, torch.float64, seed)
    here = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    counted = Counted(counts)
    for _ in range(2):  # what it remembers serves the next layer
        out, lse = attend_counted(kernels, q, k[here], v[here], counted, parts)
        for b in range(2):
            chosen = here[counts[b, here]]
            if len(chosen):
                expected = reference(q[:, b : b + 1], k[chosen, b : b + 1], v[chosen, b : b + 1])
                assert torch.allclose(out[:, b : b + 1], expected[0]) and torch.allclose(lse[:, b : b + 1], expected[1])
            else:
                assert (out[:, b] == 0).all() and lse[:, b].isneginf().all()


def test_which_keys_come_first_is_not_asked_of_the_device() -> None:
    """Else no CUDA graph could be made of it; where the keys themselves are wanted, the host has to know."""
    counted = Counted(torch.rand(2, 9) < 0.5)
    with Asked() as asked:
        counted.first([range(2, 5), range(7, 9)])
    assert asked.count == 0
    with Asked() as asked:
        counted.places([range(2, 5)])
    assert asked.count


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 20), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 99))
def test_merging_parts_equals_attending_the_whole(lq: int, parts: list[int], seed: int) -> None:
    """Parts and queries may be empty; parts come in any order."""
    q, k, v = problem(lq, sum(parts), 3, 8, torch.float64, seed)
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    at = 0
    for part in parts:
        new = cpu.attend(q, k[at : at + part], v[at : at + part])
        merged = new if merged is None else cpu.merge(*merged, *new)
        at += part
    assert merged is not None
    expected, expected_lse = reference(q, k, v) if sum(parts) else (torch.zeros_like(q), merged[1])
    assert merged[0].shape == q.shape and not merged[0].isnan().any()
    if q.numel():
        assert (merged[0] - expected).abs().max() < 1e-13
        assert sum(parts) == 0 or (merged[1] - expected_lse).abs().max() < 1e-13


def test_strided_views_are_attended_as_they_are() -> None:
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in problem(9, 7, 3, 8, torch.float64, 0))
    assert not q.is_contiguous()
    assert (cpu.attend(q, k, v)[0] - reference(q, k, v)[0]).abs().max() < 1e-13


@pytest.mark.parametrize("stride, padding", [(1, 0), ((1, 2, 2), (1, 0, 1)), ((2, 1, 1), 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_convolutions_over_time_are_torch_s(stride: Any, padding: Any, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    module: Any = torch.nn.Conv3d(6, 5, 3, stride, padding, dtype=dtype)
    x = torch.randn(1, 6, 4, 9, 11, dtype=dtype).transpose(3, 4)
    # Channels by hand, so that it is not one of torch's kernels for whole tensors against another.
    wanted = sum(
        torch.nn.functional.conv3d(
            x[:, i : i + 1].double(), module.weight[:, i : i + 1].double(), None, stride, padding
        )
        for i in range(6)
    ) + module.bias.double().view(1, -1, 1, 1, 1)
    with FastOnCpus():
        assert (module(x) - wanted).abs().max() < tolerance


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@torch.no_grad()
def test_norms_over_channels_are_torch_s(dim: int, dtype: torch.dtype, tolerance: float) -> None:
    x = 100 * torch.randn(1, 6, 4, 9, 11, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[:, :, 1, 2, 3], x[:, :, 3, 2, 1] = 0, 1e-14
    wanted = (x.double() / x.double().pow(2).sum(dim, keepdim=True).sqrt().clamp_min(1e-12)).to(dtype)
    with FastOnCpus():
        found = torch.nn.functional.normalize(x, dim=dim)
    assert (found - wanted).abs().max() < tolerance

"""The GPU's kernels against torch in float64, and against the torch operators they stand for."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from torch import Tensor

from hpcdit.kernels.base import Norm, Tables
from hpcdit.kernels.cpu import rotate
from hpcdit.models.compiling import GeluProjection
from tests.require import needs

MISSING = "no CUDA device" if not torch.cuda.is_available() else ""
MISSING = MISSING or ("" if importlib.util.find_spec("cupy") else "cupy is not installed")
pytestmark = needs("gpu", MISSING)

BF16, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [BF16, HALF, SINGLE]
# Largest relative error (2-norm) of attention to float64, with inputs rounded to the dtype before.
ATTENTION = {BF16: 3e-3, HALF: 5e-4, SINGLE: 5e-5}
# Largest relative error (2-norm) of numbers rounded to the dtype once.
ROUNDED = {BF16: 2e-3, HALF: 2.5e-4, SINGLE: 2e-7, DOUBLE: 1e-15}
SENTINEL = 77.0


@pytest.fixture
def kernels() -> Iterator[Any]:
    from hpcdit.kernels import cuda

    torch.manual_seed(0)
    cuda.use("auto")
    yield cuda
    cuda.use("auto")


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, device="cuda").to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3), scores.logsumexp(-1).permute(2, 0, 1)


def check_attention(kernels: Any, q: Tensor, k: Tensor, v: Tensor, what: str = "") -> None:
    out, lse = kernels.attend(q, k, v)
    expected, expected_lse = attention(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1
    assert lse.shape == q.shape[:3] and lse.dtype == SINGLE
    apart, lse_apart = error(out, expected), float((lse.double() - expected_lse).abs().max())
    print(f"{what} {q.dtype} q {tuple(q.shape)}, {len(k)} keys: error {apart:.1e}, of lse {lse_apart:.1e}")
    assert apart < ATTENTION[q.dtype]
    assert lse_apart < 2e-4


class Room:
    """A tensor [tokens, B, heads, D] inside a larger one, and whether a kernel wrote beside it.

    start: elements before it, 1 takes its alignment; layout: what lies outermost.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, start: int = 0, layout: str = "tokens"
    ) -> None:
        tokens, batch, heads, dim = shape
        count = tokens * batch * (heads + 2) * dim
        self.whole = torch.full((start + count + 64,), SENTINEL, dtype=dtype, device="cuda")
        inside = self.whole[start : start + count]
        if layout == "batch":
            inside = inside.view(batch, tokens, heads + 2, dim).transpose(0, 1)
        else:
            inside = inside.view(tokens, batch, heads + 2, dim)
        self.tensor = inside[:, :, 1:-1]

    def untouched_around(self) -> bool:
        inside = self.tensor.clone()
        self.tensor.fill_(SENTINEL)
        whole = bool((self.whole == SENTINEL).all())
        self.tensor.copy_(inside)
        return whole


# attend


def test_backends_are_named(kernels: Any) -> None:
    print("attention backends:", kernels.available())
    assert kernels.backend() == (*kernels.available(), "efficient")[0]
    for name in kernels.available():
        kernels.use(name)
        assert kernels.backend() == name
    with pytest.raises(ValueError, match="'fast' is none of auto, fa3, cudnn, flash"):
        kernels.use("fast")


@pytest.mark.parametrize("dim", [40, 128])
def test_keys_beyond_the_number_that_counts_are_left_out(kernels: Any, dim: int) -> None:
    """The number is read on the device: a graph serves any."""
    attend = kernels.attend_first(BF16, dim)
    if attend is None:
        pytest.skip("no backend that reads a number of keys")
    q, (k, v) = random(257, 3, 5, dim, dtype=BF16), random(2, 300, 3, 5, dim, dtype=BF16)
    count = torch.tensor([300, 1, 0], dtype=torch.int32, device="cuda")
    attend(q, k, v, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, k, v, count)
    for numbers in ([300, 1, 0], [0, 129, 64], [37, 300, 299]):
        count.copy_(torch.tensor(numbers))
        graph.replay()
        for b, n in enumerate(numbers):
            if n == 0:
                assert lse[:, b].isneginf().all() and out[:, b].isfinite().all(), "a merge takes nothing from it"
                continue
            expected, expected_lse = attention(q[:, b : b + 1], k[:n, b : b + 1], v[:n, b : b + 1])
            assert error(out[:, b : b + 1], expected) < ATTENTION[BF16]
            assert float((lse[:, b : b + 1].double() - expected_lse).abs().max()) < 2e-4


@pytest.mark.parametrize("name", ["fa3", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("dim", [32, 40, 64, 128, 256])
def test_each_backend_against_float64(kernels: Any, name: str, dtype: torch.dtype, dim: int) -> None:
    if name != "efficient" and not kernels._fits(name, dtype, dim, 2):
        pytest.skip(f"{name} is not there or not for {dtype} heads of {dim}")
    for lq, lk, heads in ((1, 1, 1), (37, 91, 5), (129, 1, 3), (1, 700, 2), (257, 300, 12)):
        if name != "efficient" and not kernels._fits(name, dtype, dim, min(lq, lk)):
            continue
        q, (k, v) = random(lq, 2, heads, dim, dtype=dtype), random(2, lk, 2, heads, dim, dtype=dtype)
        out, lse = kernels.CALLS[name](q, k, v, dim**-0.5)  # this very one: `attend` would go on to the next
        expected, expected_lse = attention(q, k, v)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == SINGLE
        apart, lse_apart = error(out, expected), float((lse.double() - expected_lse).abs().max())
        print(f"{name} {dtype} {lq} x {lk}, {heads} heads of {dim}: error {apart:.1e}, of lse {lse_apart:.1e}")
        assert apart < ATTENTION[dtype] and lse_apart < 2e-4


@pytest.mark.parametrize("name", ["auto", "fa3", "cudnn", "flash"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 32, 40, 128, 192, 256, 264])
def test_attention_of_any_dtype_and_dimension(kernels: Any, name: str, dtype: torch.dtype, dim: int) -> None:
    """What the chosen backend does not serve goes to another, with the same result."""
    if name != "auto" and name not in kernels.available():
        pytest.skip(f"{name} is not there")
    kernels.use(name)
    q, (k, v) = random(67, 1, 3, dim, dtype=dtype), random(2, 45, 1, 3, dim, dtype=dtype)
    check_attention(kernels, q, k, v, name)


@pytest.mark.parametrize("name", ["auto", "fa3", "cudnn", "flash"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_views_are_attended(kernels: Any, name: str, dtype: torch.dtype) -> None:
    if name != "auto" and name not in kernels.available():
        pytest.skip(f"{name} is not there")
    kernels.use(name)
    q, k, v = random(2, 50, 3, 8, 64, dtype=dtype).unbind(2)  # each [B, tokens, H, D], as cut from one projection
    q, k, v = (x.transpose(0, 1)[1:, :, 2:7] for x in (q, k, v))
    check_attention(kernels, q, k, v, f"{name}, strided")
    q, k, v = (random(50 * 2 * 3 * 64 + 1, dtype=dtype)[1:].view(50, 2, 3, 64) for _ in "qkv")
    check_attention(kernels, q, k, v, f"{name}, unaligned")


@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE])
def test_nothing_to_attend(kernels: Any, dtype: torch.dtype) -> None:
    q, none = random(5, 2, 3, 32, dtype=dtype), random(0, 2, 3, 32, dtype=dtype)
    out, lse = kernels.attend(q, none, none)
    assert out.dtype == dtype and out.shape == q.shape and not out.any()
    assert lse.shape == q.shape[:3] and bool(lse.isneginf().all()) and lse.device == q.device
    out, lse = kernels.attend(none, q, q)
    assert out.shape == none.shape and lse.shape == none.shape[:3]
    assert lse.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)


def test_attention_in_float64(kernels: Any) -> None:
    q, (k, v) = random(33, 2, 3, 20, dtype=DOUBLE), random(2, 17, 2, 3, 20, dtype=DOUBLE)
    out, lse = kernels.attend(q, k, v)
    expected, expected_lse = attention(q, k, v)
    assert error(out, expected) < 1e-13 and error(lse, expected_lse) < 1e-13 and lse.dtype == DOUBLE


# merge


def merged(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, by hand."""
    lse, new_lse = lse.double(), new_lse.double()
    both = torch.logaddexp(lse, new_lse)
    weights = [(x - both).exp().nan_to_num(0.0)[..., None] for x in (lse, new_lse)]
    return out.double() * weights[0] + new_out.double() * weights[1], both


def partials(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, new_dtype: torch.dtype, lse_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Two partial results of batch 2, the lse of the first and the out of the second strided; some without keys."""
    out, new_out = random(tokens, 2, heads, dim, dtype=dtype), random(2, tokens, heads, dim, dtype=new_dtype)
    lse, new_lse = random(2, heads, tokens, dtype=lse_dtype).mul_(3), random(tokens, 2, heads, dtype=lse_dtype).mul_(3)
    lse, new_out = lse.permute(2, 0, 1), new_out.transpose(0, 1)
    lse[0], new_lse[-1], lse[:, 1, 0], new_lse[:, 1, 0] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    out[lse.isneginf()] = 0
    new_out[new_lse.isneginf()] = 0
    return out, lse, new_out, new_lse


DTYPE_SETS = [(a, b, SINGLE) for a in (BF16, HALF, SINGLE) for b in (BF16, HALF, SINGLE)]


@pytest.mark.parametrize("dtype, new_dtype, exact", [*DTYPE_SETS, (DOUBLE, DOUBLE, DOUBLE), (DOUBLE, BF16, DOUBLE)])
@pytest.mark.parametrize("tokens, heads, dim", [(3, 1, 32), (37, 5, 128), (65, 3, 40), (9, 2, 7), (2, 3, 3000)])
def test_merge_against_float64(
    kernels: Any, dtype: torch.dtype, new_dtype: torch.dtype, exact: torch.dtype, tokens: int, heads: int, dim: int
) -> None:
    parts = partials(tokens, heads, dim, dtype, new_dtype, exact)
    out, lse = kernels.merge(*parts)
    expected, expected_lse = merged(*parts)
    assert out.dtype == lse.dtype == exact and not out.isnan().any() and not lse.isnan().any()
    assert error(out, expected) < 5 * ROUNDED[exact]
    keyless = expected_lse.isneginf()
    assert bool(keyless.any()) and torch.equal(lse.isneginf(), keyless) and not out[keyless].any()
    assert error(lse[~keyless], expected_lse[~keyless]) < 5 * ROUNDED[exact]


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("layout", ["tokens", "batch"])
@pytest.mark.parametrize("dim", [128, 40, 7])
@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE])
def test_merge_into_a_strided_place(kernels: Any, dtype: torch.dtype, dim: int, layout: str, start: int) -> None:
    for first in (SINGLE, BF16):
        parts = partials(29, 5, dim, first, dtype, SINGLE)
        room = Room((29, 2, 5, dim), dtype, start, layout)
        out, lse = kernels.merge(*parts, into=room.tensor)
        expected, _ = kernels.merge(*parts)
        assert out is room.tensor and torch.equal(out, expected.to(dtype))
        assert room.untouched_around()
        assert error(out, merged(*parts)[0]) < max(ROUNDED[dtype], 1e-6) and lse.dtype == SINGLE


def test_merge_in_place(kernels: Any) -> None:
    out, lse, new_out, new_lse = partials(21, 3, 64, SINGLE, BF16, SINGLE)
    expected, _ = kernels.merge(out, lse, new_out, new_lse)
    kernels.merge(out, lse, new_out, new_lse, into=out)
    assert torch.equal(out, expected)


def test_merge_of_nothing_and_of_what_does_not_fit(kernels: Any) -> None:
    parts = partials(4, 3, 32, SINGLE, SINGLE, SINGLE)
    out, lse = kernels.merge(*(x[:0] for x in parts))
    assert out.shape == (0, 2, 3, 32) and lse.shape == (0, 2, 3)
    with pytest.raises(ValueError, match="cannot merge"):
        kernels.merge(*parts, into=parts[0][1:])
    with pytest.raises(ValueError, match="the last is to be 1"):
        kernels.merge(*parts, into=random(4, 2, 32, 3, dtype=SINGLE).transpose(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_parts_equals_attending_the_whole(kernels: Any, dtype: torch.dtype) -> None:
    q, (k, v) = random(75, 2, 3, 64, dtype=dtype), random(2, 200, 2, 3, 64, dtype=dtype)
    parts = [kernels.attend(q, k[a:b], v[a:b]) for a, b in ((0, 0), (0, 70), (70, 71), (71, 200))]
    found = parts[0]
    for part in parts[1:-1]:
        found = kernels.merge(*found, *part)
    room = Room((75, 2, 3, 64), dtype)
    out, lse = kernels.merge(*found, *parts[-1], into=room.tensor)
    expected, expected_lse = attention(q, k, v)
    assert error(out, expected) < 1.2 * ATTENTION[dtype] and (lse.double() - expected_lse).abs().max() < 2e-4


# embed


def turned(x: Tensor, norm: Norm | None, tables: Tables | None) -> Tensor:
    """The torch operators that `embed` stands for; [tokens, B, H, D]."""
    if norm is not None:
        weight, eps = norm
        x = torch.nn.functional.rms_norm(x.flatten(2), weight.shape, weight, eps).view(x.shape)
    return (x if tables is None else rotate(x, *tables)).transpose(0, 1)


def operands(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, table: torch.dtype, cut: bool, start: int
) -> tuple[Tensor, Norm, Tables]:
    """x [2, tokens, heads, dim], cut from a wider projection or by itself from element `start` on; norm; tables."""
    if cut:
        x = random(2, tokens, 3, heads, dim, dtype=dtype)[:, :, 1]
    else:
        x = random(2 * tokens * heads * dim + start, dtype=dtype)[start:].view(2, tokens, heads, dim)
    weight = torch.rand(heads * dim, device="cuda").add(0.5).to(dtype)
    angles = torch.rand(tokens, 1, dim // 2, dtype=DOUBLE, device="cuda") * 50
    return x, (weight, 1e-6), (angles.cos().to(table), angles.sin().to(table))


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype, rotated: bool) -> None:
    """Equal but for sums in another order: these turn a few numbers to the neighbouring one of their dtype."""
    found, expected = found.double(), expected.double()
    size = expected.abs()
    if rotated:  # a pair's numbers come from each other: what one step is depends on the larger
        size = expected.unflatten(3, (-1, 2)).norm(dim=-1, keepdim=True).expand(*expected.shape[:3], -1, 2).flatten(3)
    apart = (found - expected).abs()
    steps = float((apart / (size + torch.finfo(dtype).tiny)).max()) / torch.finfo(dtype).eps
    share = float((apart > 0).double().mean())
    print(f"{dtype}: {share:.2%} differ, by up to {steps:.2f} steps")
    if dtype in (BF16, HALF):
        assert share < 0.02 and steps <= (2.5 if rotated else 1)
    else:
        assert steps < 8


@pytest.mark.parametrize("normed, rotated", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE])
@pytest.mark.parametrize(
    "tokens, heads, dim", [(1, 1, 32), (37, 5, 128), (19, 3, 40), (11, 12, 64), (5, 40, 128), (3, 3, 6)]
)
def test_embed_against_torch(
    kernels: Any, tokens: int, heads: int, dim: int, dtype: torch.dtype, normed: bool, rotated: bool
) -> None:
    for table, cut, start in ((SINGLE, False, 0), (SINGLE, True, 0), (DOUBLE, False, 0), (SINGLE, False, 1)):
        x, norm, tables = operands(tokens, heads, dim, dtype, table, cut, start)
        given = (norm if normed else None, tables if rotated else None)
        expected = turned(x, *given)
        found = torch.full_like(expected, SENTINEL)
        kernels.embed(x, *given, [(range(heads), found)])
        if not normed:
            assert torch.equal(found, expected)
            continue
        check_close(found, expected, dtype, rotated)
        weight, (cos, sin) = norm[0].double(), (y.double() for y in tables)
        exact = turned(x.double(), (weight, norm[1]), (cos, sin) if rotated else None)
        assert error(found, exact) < ROUNDED[dtype] * (1.5 if dtype in (BF16, HALF) else 5)


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("layout", ["tokens", "batch"])
@pytest.mark.parametrize("counts", [[7], [3, 4], [1, 0, 2, 4], [1] * 7])
def test_embed_fills_each_block_and_nothing_else(kernels: Any, counts: list[int], layout: str, start: int) -> None:
    for dtype, dim in ((BF16, 128), (SINGLE, 40), (HALF, 10)):
        x, norm, tables = operands(23, 7, dim, dtype, SINGLE, True, 0)
        whole = torch.empty(23, 2, 7, dim, dtype=dtype, device="cuda")
        kernels.embed(x, norm, tables, [(range(7), whole)])
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        heads = [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
        rooms = [Room((23, 2, len(which), dim), dtype, start, layout) for which in heads]
        kernels.embed(x, norm, tables, [(which, room.tensor) for which, room in zip(heads, rooms, strict=True)])
        for which, room in zip(heads, rooms, strict=True):
            # Without 16-byte loads a token's squares are summed in another order.
            near = {BF16: 2.0**-7, HALF: 2.0**-10, SINGLE: 2e-6}[dtype]
            torch.testing.assert_close(room.tensor, whole[:, :, which.start : which.stop], rtol=near, atol=1e-6)
            assert room.untouched_around()


def test_embed_takes_more_blocks_than_fit_one_launch(kernels: Any) -> None:
    x, norm, tables = operands(6, 40, 64, BF16, SINGLE, False, 0)
    whole, parts = (torch.zeros(6, 2, 40, 64, dtype=BF16, device="cuda") for _ in range(2))
    kernels.embed(x, norm, tables, [(range(40), whole)])
    kernels.embed(x, norm, tables, [(range(i, i + 1), parts[:, :, i : i + 1]) for i in reversed(range(40))])
    assert torch.equal(whole, parts)


def test_embed_with_a_norm_in_float32_and_without_tokens(kernels: Any) -> None:
    x, (weight, eps), tables = operands(6, 5, 64, BF16, SINGLE, False, 0)
    norm = (weight.float() + 1e-4, eps)  # not a bfloat16
    found = torch.empty(6, 2, 5, 64, dtype=BF16, device="cuda")
    kernels.embed(x, norm, None, [(range(5), found)])
    check_close(found, turned(x.float(), norm, None).to(BF16), BF16, False)
    kernels.embed(x[:, :0], norm, (tables[0][:0], tables[1][:0]), [(range(5), found[:0])])


def test_embed_copies_what_has_no_heads(kernels: Any) -> None:
    """As the gather of tokens publishes: [B, tokens, 1, channels], any number of channels."""
    for channels in (64, 33):
        x = random(2, 2 * 9, channels, dtype=SINGLE)[:, ::2, None]
        found = torch.empty(9, 2, 1, channels, device="cuda")
        kernels.embed(x, None, None, [(range(1), found)])
        assert torch.equal(found, x.transpose(0, 1))


def test_embed_refuses_what_does_not_fit(kernels: Any) -> None:
    x, norm, tables = operands(6, 5, 64, BF16, SINGLE, False, 0)
    block = torch.empty(6, 2, 5, 64, dtype=BF16, device="cuda")
    for wrong in (block.float(), block[1:], block[:, :, :4]):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.embed(x, norm, tables, [(range(5), wrong)])
    with pytest.raises(ValueError, match="tables of"):
        kernels.embed(x, norm, (tables[0][1:], tables[1][1:]), [(range(5), block)])
    with pytest.raises(ValueError, match="a norm of"):
        kernels.embed(x, (norm[0][1:], 1e-6), tables, [(range(5), block)])


# to_uint8


@pytest.mark.parametrize("dtype", [*DTYPES, DOUBLE])
def test_frames_to_uint8_as_torch(kernels: Any, dtype: torch.dtype) -> None:
    edges = torch.arange(-2, 258, dtype=DOUBLE, device="cuda")
    values = torch.cat([edges / 255, (edges + 0.5) / 255, torch.rand(1001, dtype=DOUBLE, device="cuda")]).to(dtype)
    for frames in (values, values[1:], values[:1521].view(3, 13, 39).transpose(0, 2), values[:0]):
        found = kernels.to_uint8(frames)
        assert found.dtype == torch.uint8 and found.is_contiguous()
        assert torch.equal(found, (frames * 255).round().clamp(0, 255).to(torch.uint8))


# where and when


@pytest.mark.parametrize("name", ["auto", "cudnn", "flash"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_graph_replays_them_all(kernels: Any, name: str, dtype: torch.dtype) -> None:
    if name != "auto" and name not in kernels.available():
        pytest.skip(f"{name} is not there")
    kernels.use(name)
    x, norm, tables = operands(48, 4, 64, dtype, SINGLE, False, 0)
    q, k = (torch.zeros(48, 2, 4, 64, dtype=dtype, device="cuda") for _ in range(2))

    def layer() -> tuple[Tensor, ...]:
        kernels.embed(x, norm, tables, [(range(4), q)])
        kernels.embed(x, None, None, [(range(1), k[:, :, :1]), (range(1, 4), k[:, :, 1:])])
        parts = [kernels.attend(q, k[a:b], k[a:b]) for a, b in ((0, 16), (16, 40), (40, 48))]
        kept, lse = kernels.merge(*parts[0], *parts[1])
        into = torch.empty_like(q)
        kernels.merge(kept, lse, *parts[2], into=into)
        return kept, lse, into, kernels.to_uint8(into)

    kernels.warm(dtype, 64, x.device)
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for found, expected in zip(replayed, layer(), strict=True):
            assert torch.equal(found, expected)
        assert error(replayed[2], attention(q, k, k)[0]) < 1.2 * ATTENTION[dtype]


def test_warm_compiles_all_that_a_capture_needs(kernels: Any) -> None:
    x, norm, tables = operands(48, 4, 96, BF16, SINGLE, False, 0)
    kernels._kernel.cache_clear()
    kernels.warm(BF16, 96, x.device)
    compiled = kernels._kernel.cache_info().misses
    q = torch.zeros(48, 2, 4, 96, dtype=BF16, device="cuda")
    kernels.embed(x, norm, tables, [(range(4), q)])
    part = kernels.attend(q, q, q)
    kernels.merge(*kernels.merge(*part, *part), *part, into=q)
    assert kernels._kernel.cache_info().misses == compiled


def test_work_is_queued_on_the_current_stream(kernels: Any) -> None:
    """On another stream the kernels would read before the values are there."""
    x = torch.zeros(2, 64, 4, 64, device="cuda")
    found = torch.zeros(64, 2, 4, 64, device="cuda")
    ones = torch.ones_like(x)
    kernels.embed(x, None, None, [(range(4), found)])  # compiles
    kernels.to_uint8(found)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        x.copy_(ones)
        kernels.embed(x, None, None, [(range(4), found)])
        frames = kernels.to_uint8(found)
    stream.synchronize()
    assert bool((found == 1).all()) and bool((frames == 255).all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_a_device_that_is_not_the_current(kernels: Any) -> None:
    assert torch.cuda.current_device() == 0
    x, norm, tables = operands(48, 4, 64, BF16, SINGLE, False, 0)
    results = []
    for device in ("cuda:0", "cuda:1"):
        moved, weight, cos, sin = (y.to(device) for y in (x, norm[0], *tables))
        q = torch.zeros(48, 2, 4, 64, dtype=BF16, device=device)
        kernels.embed(moved, (weight, norm[1]), (cos, sin), [(range(4), q)])
        part = kernels.attend(q, q, q)
        out, _ = kernels.merge(*part, *part, into=torch.empty_like(q))
        results.append([y.cpu() for y in (q, part[1], out, kernels.to_uint8(out))])
        assert out.device == torch.device(device)
    assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# What the models fuse


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_a_fused_gelu_is_no_worse_than_the_two_operators(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    plain = GELU(512, 1536, approximate="tanh").to("cuda", dtype).requires_grad_(False)
    fused, x = GeluProjection(plain.proj), random(2, 257, 512, dtype=dtype).mul_(3)
    weight, bias = plain.proj.weight.double(), plain.proj.bias.double()
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), weight, bias), approximate="tanh")
    found, usual = (torch.compile(fused, dynamic=False) if compiled else fused)(x), plain(x)
    print(f"{dtype}: error {error(found, exact):.1e}, of the two operators {error(usual, exact):.1e}")
    assert error(found, exact) < 1.5 * error(usual, exact)

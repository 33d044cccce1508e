"""What runs on the device, for NVIDIA GPUs: attention by vendors' kernels, the rest by CUDA kernels of our own.

The same functions as in `kernels.cpu`, where each is explained; the layout is `[tokens, batch, heads, dim]` throughout.
All of them only queue work on torch's current stream of the tensors' device, so that they can be captured in a CUDA
graph; kernels are compiled and libraries loaded at first use, which a capture does not allow: `warm` does it before.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]
import numpy as np
import torch
from torch import Tensor

from .base import AttendFirst, Blocks, Norm, Partial, Tables
from .cuda_source import MAX_BLOCKS, SOURCE

BACKENDS = ("auto", "fa3", "cudnn", "flash")
THREADS = 256  # a thread block, where nothing else decides
VECTOR = 16  # bytes, the widest load or store of a thread
LEAST_PART = 1 << 24  # as in kernels.cpu; below, each part's last tiles leave SMs idle for longer than a copy takes
Grid = tuple[int, ...]

_wanted = "auto"


def use(name: str) -> None:
    """Chooses the attention backend of this process; "auto" is the fastest that is there. Raises ValueError."""
    global _wanted
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is none of {', '.join(BACKENDS)}")
    if name != "auto" and name not in available():
        raise ValueError(f"attention backend {name!r} is not there, only {', '.join(available()) or 'none of them'}")
    _wanted = name


def backend() -> str:
    """The attention backend for halves; a call that it cannot serve (see `_fits`) goes to the next that can."""
    return _wanted if _wanted != "auto" else (*available(), "efficient")[0]


@cache
def available() -> tuple[str, ...]:
    """The attention backends of this machine, the fastest first. All GPUs of a process are taken to be of one kind."""
    major, _ = torch.cuda.get_device_capability()
    there = {
        "fa3": major == 9 and bool(_fa3_dtypes()),
        "cudnn": major >= 8 and torch.backends.cudnn.is_available() and torch.backends.cudnn.version() >= 90000,
        "flash": major >= 8 and torch.backends.cuda.is_flash_attention_available(),
    }
    return tuple(name for name, found in there.items() if found)


@cache
def _fa3_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes that the installed FlashAttention 3 was built for: the wheel `fa3-fwd` leaves out float16."""
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return ()
    try:
        importlib.import_module("fa3_fwd_interface")
        flags = importlib.import_module("fa3_fwd_config").CONFIG["build_flags"]
    except (ImportError, OSError, KeyError):  # OSError: built for another torch or CUDA
        return ()
    return (torch.bfloat16,) if flags.get("FLASHATTENTION_DISABLE_FP16") else (torch.bfloat16, torch.float16)


def _fits(name: str, dtype: torch.dtype, dim: int, shortest: int) -> bool:
    """Whether a backend is there and serves this call; shortest: the smaller of the numbers of queries and keys."""
    if name not in available() or dtype not in (torch.float16, torch.bfloat16):
        return False
    if name == "cudnn":  # refuses single keys
        return dim <= 128 and shortest > 1
    return dim <= 256 and (name != "fa3" or dtype in _fa3_dtypes())


def attend_first(dtype: torch.dtype, dim: int) -> AttendFirst | None:
    """See `kernels.cpu`: FlashAttention 3 reads on the device how many keys count."""
    return _fa3_first if backend() == "fa3" and _fits("fa3", dtype, dim, 1) else None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Attention of all of q to all of k, v, with the log-sum-exp of its scores (natural logarithm).

    q: [Lq, B, H, D]; k, v: [Lk, B, H, D]; any strides with unit stride in D; Lq, Lk, H may be zero.
    Returns out [Lq, B, H, D] in q's dtype and lse [Lq, B, H] in float32 (float64 for float64 inputs, of which all
    scores are held at once: for tests).
    """
    if q.numel() == 0 or k.numel() == 0:
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=lse_dtype, device=q.device)
    dim, scale = q.shape[3], q.shape[3] ** -0.5
    if q.dtype == torch.float64:
        scores = torch.einsum("ibhd,jbhd->ibhj", q, k) * scale
        lse = scores.logsumexp(-1)
        return torch.einsum("ibhj,jbhd->ibhd", (scores - lse[..., None]).exp(), v), lse
    q, k, v = (_loadable(x) for x in (q, k, v))
    names = (backend(), "cudnn", "flash")
    name = next((name for name in names if _fits(name, q.dtype, q.shape[3], min(len(q), len(k)))), "efficient")
    out, lse = CALLS[name](q, k, v, scale)
    return out[..., :dim], lse


def _loadable(x: Tensor) -> Tensor:
    """x as the attention kernels load it, a copy if need be: D a multiple of 8, all rows at multiples of 16 bytes."""
    if short := -x.shape[3] % 8:
        return torch.nn.functional.pad(x, (0, short))
    return x if _vectors(x) else x.clone(memory_format=torch.contiguous_format)


def _fa3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
    call = importlib.import_module("fa3_fwd_interface").flash_attn_func
    out, lse = call(*(x.transpose(0, 1) for x in (q, k, v)), softmax_scale=scale, return_attn_probs=True)
    return out.transpose(0, 1), lse.permute(2, 0, 1)


def _fa3_first(q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Partial:
    call = importlib.import_module("fa3_fwd_interface").flash_attn_with_kvcache
    options = {"softmax_scale": q.shape[3] ** -0.5, "num_splits": 1, "return_softmax_lse": True}
    rows = (_loadable(x).transpose(0, 1) for x in (q, k, v))
    out, lse = call(*rows, cache_seqlens=count, **options)[:2]
    lse = lse.masked_fill(count[:, None, None] == 0, -torch.inf)
    return out.transpose(0, 1)[..., : q.shape[3]], lse.permute(2, 0, 1)


def _aten(name: str, *options: object) -> Callable[[Tensor, Tensor, Tensor, float], Partial]:
    """torch's own attention, through the operators that return the log-sum-exp too."""

    def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
        out, lse = operator(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), *options, scale=scale)[:2]
        # cuDNN's lse has a last dimension of one; the efficient kernel's is padded to a multiple of 32 queries.
        return out.permute(2, 0, 1, 3), lse.flatten(2)[..., : q.shape[0]].permute(2, 0, 1)

    return call


CALLS = {
    "fa3": _fa3,
    "cudnn": _aten("cudnn", None, True),
    "flash": _aten("flash"),
    "efficient": _aten("efficient", None, True),
}


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, into: Tensor | None = None) -> Partial:
    """Merges two partial results over disjoint keys by their log-sum-exp, in one pass, in float32 or better.

    out, new_out: [tokens, B, H, D], each of its own dtype; lse, new_lse: [tokens, B, H], float32 or float64, any
    strides. The merged out is new, in lse's dtype, or `into` ([tokens, B, H, D], unit stride in D, also memory of a
    peer), rounded to its dtype; `into` may be `out` or `new_out` itself. Raises ValueError where shapes do not fit.
    """
    exact = torch.promote_types(lse.dtype, new_lse.dtype)
    lse, new_lse = lse.to(exact), new_lse.to(exact)
    result = torch.empty(out.shape, dtype=exact, device=out.device) if into is None else into
    merged = torch.empty(lse.shape, dtype=exact, device=out.device)
    if not out.shape == new_out.shape == result.shape or not out.shape[:3] == lse.shape == new_lse.shape:
        raise ValueError(f"cannot merge {out.shape}, {new_out.shape}, {lse.shape}, {new_lse.shape} to {result.shape}")
    _check_unit(result)
    if out.numel() == 0:
        return result, merged
    tensors = [_unit(out), _unit(new_out), result]
    size = VECTOR // min(x.element_size() for x in tensors)
    wide = all(_vectors(x) for x in tensors) and out.shape[3] % size == 0
    types = ", ".join(TYPES[x.dtype] for x in (*tensors, lse))
    kernel = f"merge<{types}, {size if wide else 1}, {str(wide).lower()}>"
    vectors = out.shape[3] // (size if wide else 1)
    across = min(vectors, THREADS)
    rows_a_block = max(THREADS // across, 1)
    rows = lse.numel()
    args = [_rows(x) for x in (*tensors, lse, new_lse)]
    sizes = [np.int32(n) for n in (out.shape[1], out.shape[2], rows, vectors)]
    grid = (-(-rows // rows_a_block),)
    _launch(kernel, out.device, grid, (across, rows_a_block), (*args, merged.data_ptr(), *sizes))
    return result, merged


def embed(x: Tensor, norm: Norm | None, tables: Tables | None, blocks: Blocks) -> None:
    """Normalises and rotates x, each where asked for, and writes it into `blocks`: all in one kernel.

    x: [B, tokens, H, D], numbers of a token side by side; norm: weight [H * D] of an RMS norm and its epsilon; tables:
    cos and sin, [tokens, 1, D / 2], float32 or float64; blocks: [tokens, B, heads, D] of x's dtype, unit stride in D,
    none over another. Rounds where `kernels.cpu` does: to x's dtype after the norm and after the rotation.
    Raises ValueError where shapes or dtypes do not fit.
    """
    batch, tokens, heads, dim = x.shape
    for which, block in blocks:
        if block.shape != (tokens, batch, len(which), dim) or block.dtype != x.dtype or which.stop > heads:
            raise ValueError(f"{which} of {tuple(x.shape)} {x.dtype} do not fit {tuple(block.shape)} {block.dtype}")
        _check_unit(block)
    if (heads > 1 and x.stride(2) != dim) or (dim > 1 and x.stride(3) != 1):
        x = x.contiguous()
    size = VECTOR // x.element_size()
    wide = dim % size == 0 and _vectors(x.transpose(0, 1), *(block for _, block in blocks))
    weight, eps, cos, sin = x, 0.0, x, x  # stand-ins, not read
    if norm is not None:
        weight, eps = norm[0].contiguous(), norm[1]
        if weight.shape != (heads * dim,):
            raise ValueError(f"a norm of {tuple(weight.shape)} weights does not fit {heads} heads of {dim}")
        wide = wide and weight.data_ptr() % VECTOR == 0
    if tables is not None:
        exact = torch.promote_types(tables[0].dtype, torch.float32)
        cos, sin = (table.to(exact).contiguous() for table in tables)
        if not cos.shape == sin.shape == (tokens, 1, dim // 2) or dim % 2:
            raise ValueError(f"tables of {tuple(cos.shape)}, {tuple(sin.shape)} do not fit {tokens} tokens of {dim}")
        wide = wide and _vectors(cos[:, :, None], sin[:, :, None])
    size = size if wide else 2 if tables is not None else 1
    types = f"{TYPES[x.dtype]}, {TYPES[weight.dtype]}, {TYPES[cos.dtype]}"
    flags = ", ".join(str(flag).lower() for flag in (wide, norm is not None, tables is not None))
    kernel = f"embed<{types}, {size}, {flags}>"
    blocks = [(which, block) for which, block in blocks if block.numel()]
    for start in range(0, len(blocks), MAX_BLOCKS):
        part = blocks[start : start + MAX_BLOCKS]
        targets = np.zeros(1, BLOCKS)
        for at, (which, block) in enumerate(part):
            targets["block"][0, at] = (_rows(block)[0], which.start, len(which))
        targets["count"] = len(part)
        work = max(sum(len(which) for which, _ in part), heads if norm is not None else 0) * dim // size
        rounds = -(-work // (2 * THREADS))
        threads = -(-work // (rounds * 32)) * 32  # as many rounds for all
        shape = [np.int32(n) for n in (heads, dim)]
        pointers = [y.data_ptr() for y in (weight, cos, sin)]
        args = (x.data_ptr(), x.stride(1), x.stride(0), *pointers, np.float64(eps), *shape, targets)
        _launch(kernel, x.device, (tokens, batch), (threads,), args)


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [0, 1] to 0..255, rounded to nearest; same shape, contiguous."""
    frames = frames.contiguous()
    out = torch.empty(frames.shape, dtype=torch.uint8, device=frames.device)
    if count := frames.numel():
        size = VECTOR // frames.element_size()
        wide = frames.data_ptr() % VECTOR == 0
        kernel = f"to_uint8<{TYPES[frames.dtype]}, {size}, {str(wide).lower()}>"
        grid = (-(-count // (size * THREADS)),)
        _launch(kernel, frames.device, grid, (THREADS,), (frames.data_ptr(), out.data_ptr(), count))
    return out


def warm(dtype: torch.dtype, dim: int, device: torch.device, heads: int = 2) -> None:
    """Runs what layers of this dtype and head dimension run once, so that a capture finds everything compiled.

    Blocks that start at odd places, or have a stride that vectors do not fit, have kernels of their own, which this
    leaves out; running the very calls once before their capture compiles those too.
    """
    x = torch.zeros(1, 2, heads, dim, dtype=dtype, device=device)
    whole = [(range(heads), x.new_empty(2, 1, heads, dim))]
    norm = (x.new_ones(heads * dim), 1e-6)
    table = x.new_ones(2, 1, dim // 2, dtype=torch.float32)
    embed(x, None, None, whole)
    embed(x, norm, (table, table), whole)
    rows = x.transpose(0, 1)
    first, second = attend(rows, rows, rows), attend(rows, rows, rows)
    if first_keys := attend_first(dtype, dim):
        first_keys(rows, rows, rows, torch.ones(1, dtype=torch.int32, device=device))
    for part in (first, merge(*first, *second)):
        for into in (None, whole[0][1]):
            merge(*part, *second, into=into)
    for frames in (x, x.float()):
        to_uint8(frames)


TYPES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "float", torch.float64: "double"}
# The structures `Rows`, `Block` and `Blocks` of the CUDA source; an array of one element is passed by value.
ROWS = np.dtype([("data", np.uint64), ("strides", np.int64, 3)])
BLOCK = np.dtype([("rows", ROWS), ("first", np.int64), ("count", np.int64)])
BLOCKS = np.dtype([("block", BLOCK, MAX_BLOCKS), ("count", np.int64)])


def _rows(x: Tensor) -> np.ndarray:
    return np.array([(x.data_ptr(), x.stride()[:3])], ROWS)


def _unit(x: Tensor) -> Tensor:
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


def _check_unit(x: Tensor) -> None:
    if _unit(x) is not x:
        raise ValueError(f"cannot write to strides {x.stride()}: the last is to be 1")


def _vectors(*tensors: Tensor) -> bool:
    """Whether all rows, [a, b, c, D], start at multiples of 16 bytes."""
    for x in tensors:
        steps = [stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
        if _unit(x) is not x or any(at % VECTOR for at in (x.data_ptr(), *(s * x.element_size() for s in steps))):
            return False
    return True


class _Stream:
    """A torch stream by the CUDA stream protocol, which torch's own class speaks only in later versions."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


@cache
def _kernel(name: str, device: int) -> Callable[[Grid, Grid, Sequence[object]], None]:
    """The compiled kernel of that C++ name on the current device, `device`; CuPy keeps binaries on disk too."""
    # Products and sums are rounded one by one (no fused multiply-add), as torch's separate operators round them.
    module = cupy.RawModule(code=SOURCE, options=("--std=c++17", "--fmad=false"), name_expressions=(name,))
    return module.get_function(name)


def _launch(name: str, device: torch.device, grid: Grid, block: Grid, args: Sequence[object]) -> None:
    assert device.index is not None
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(device)):
        _kernel(name, device.index)(grid, block, args)

"""The GPU's kernels, timed: attention by backend; merge and embed beside the torch operators that they stand for.

python tools/bench/kernels.py
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcdit.kernels import cpu  # torch's operators run on any device

HEADS = "12,20,24,40"  # of Wan 1.3B; of 14B on two ranks; of HunyuanVideo; of 14B
LENGTHS = "4096,8192,16384,32768"
ROWS = 32760  # tokens of 81 frames of 480 x 832


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", default=LENGTHS, help="tokens of attention, a list")
    parser.add_argument("--heads", default=HEADS, help="a list")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=ROWS, help="of merge and embed")
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of each")
    args = parser.parse_args(words)
    missing = "no CUDA device" if not torch.cuda.is_available() else ""
    missing = missing or ("" if importlib.util.find_spec("cupy") else "cupy is not installed")
    if missing:
        print(f"nothing to measure: {missing}", file=sys.stderr)
        return 0
    from hpcdit.kernels import cuda

    lengths, heads = ([int(n) for n in text.split(",")] for text in (args.lengths, args.heads))
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}; bfloat16, D = {args.dim}, medians of {args.repeat}")
    attention(cuda, lengths, heads, args.dim, args.repeat)
    merge(cuda, args.tokens, heads, args.dim, args.repeat)
    embed(cuda, args.tokens, heads, args.dim, args.repeat)
    return 0


def seconds(run: Callable[[], object], repeat: int) -> float:
    """The median time of a run on the device, which is kept busy, so that launches are not part of it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    torch.cuda._sleep(20_000_000)  # some 10 ms, in which the host gets ahead
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def attention(cuda: Any, lengths: Sequence[int], heads: Sequence[int], dim: int, repeat: int) -> None:
    names = cuda.available()
    print("\nattention, TFLOP/s" + "".join(f"{name:>10}" for name in names))
    for count in heads:
        for length in lengths:
            q, k, v = (random(length, 1, count, dim) for _ in range(3))
            found = []
            for name in names:
                cuda.use(name)
                taken = seconds(partial(cuda.attend, q, k, v), repeat)
                found.append(4 * length**2 * count * dim / taken / 1e12)
            print(f"H {count:3d}, L {length:6d}  " + "".join(f"{value:10.0f}" for value in found))
    cuda.use("auto")


def compare(what: str, nbytes: int, repeat: int, function: str, modules: Sequence[Any], *args: Any) -> None:
    """Times one function of both modules; nbytes: what has to be read and written once."""
    taken = [seconds(partial(getattr(module, function), *args), repeat) for module in modules]
    text = "   ".join(f"{one * 1e6:8.0f} us {nbytes / one / 1e9:6.0f} GB/s" for one in taken)
    print(f"{what:44s} {text}   {taken[1] / taken[0]:5.1f}x")


def merge(cuda: Any, tokens: int, heads: Sequence[int], dim: int, repeat: int) -> None:
    print(f"\nmerge, {tokens} tokens{'':24} {'kernel':>22}   {'torch':>22}")
    for count in heads:
        shape = (tokens, 1, count, dim)
        new, whole, into = random(*shape), random(*shape, dtype=torch.float32), random(*shape)
        lse, new_lse = (random(*shape[:3], dtype=torch.float32) for _ in range(2))
        for text, out, target in (
            ("bf16 + bf16 to float32", into.clone(), None),
            ("float32 + bf16 to float32", whole, None),
            ("bf16 + bf16 to bf16", into.clone(), into),
            ("float32 + bf16 to bf16", whole, into),
        ):
            result = whole if target is None else target
            nbytes = sum(x.nbytes for x in (out, new, result, lse, new_lse, lse))
            operands = out, lse, new, new_lse, target
            compare(f"  H {count:3d}, {text}", nbytes, repeat, "merge", (cuda, cpu), *operands)


def embed(cuda: Any, tokens: int, heads: Sequence[int], dim: int, repeat: int) -> None:
    print(f"\nembed, {tokens} tokens{'':24} {'kernel':>22}   {'torch':>22}")
    angles = torch.rand(tokens, 1, dim // 2, device="cuda")
    tables = angles.cos(), angles.sin()
    for count in heads:
        x, weight = random(1, tokens, count, dim), random(count * dim)
        whole = torch.empty(tokens, 1, count, dim, device="cuda", dtype=x.dtype)
        cuts = [range(i * count // 4, (i + 1) * count // 4) for i in range(4)]
        parts = [(cut, whole.new_empty(tokens, 1, len(cut), dim)) for cut in cuts]
        for text, norm, turn, blocks in (
            ("copy, 1 block", None, None, [(range(count), whole)]),
            ("norm + rotary, 1 block", (weight, 1e-6), tables, [(range(count), whole)]),
            ("norm + rotary, 4 blocks", (weight, 1e-6), tables, parts),
        ):
            nbytes = 2 * x.nbytes + (sum(table.nbytes for table in tables) if turn else 0)
            compare(f"  H {count:3d}, {text}", nbytes, repeat, "embed", (cuda, cpu), x, norm, turn, blocks)


if __name__ == "__main__":
    sys.exit(main())

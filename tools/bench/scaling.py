"""How one host's ranks scale: attention, a model's step, and a batch, on all of them and on smaller groups.

python tools/bench/scaling.py --ranks 8                # 8 GPUs: under 9 minutes
python tools/bench/scaling.py --ranks 8 --small        # a look at the program itself, on the CPU too

Attention and steps are run by scaling_groups.py under one mpirun: groups of 1, 2, 4 ... ranks, all ranks busy at the
same time. The batch is the program itself, once with the planner's layout, once with a video a rank, once with all
ranks at each video. The tables are printed, and every row goes to --csv.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
PROMPTS = tuple(f"a {c} {s} moving {d}" for c in ("red", "blue") for s in ("circle", "square") for d in ("left", "up"))
LAYOUTS = {  # of the batch
    "planner": (),
    "a video a rank": ("parallel.replicas={ranks}",),
    "all ranks a video": ("parallel.replicas=1",),
}
COLUMNS = ("what", "case", "ranks", "nodes", "method", "milliseconds", "speed-up", "predicted ms", "note")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of this host, a power of two")
    parser.add_argument("--csv", type=Path, default=Path("scaling.csv"))
    parser.add_argument("--videos", type=int, default=16, help="of the batch; 0: no batch")
    parser.add_argument("--model", default="", help="of the batch: model.path; default: the demo")
    parser.add_argument("--small", action="store_true", help="short sequences and a tiny model: for a CPU")
    parser.add_argument("--limit-s", type=float, default=530, help="after which nothing new is begun")
    return parser


def groups(args: argparse.Namespace, rows_file: Path, limit_s: float) -> None:
    """Attention and steps; what is measured before a failure counts."""
    command = [str(BIN / "mpirun"), "-n", str(args.ranks), sys.executable, str(HERE / "scaling_groups.py")]
    command += ["--csv", str(rows_file), "--limit-s", f"{limit_s:.0f}", *["--small"] * args.small]
    code = subprocess.run(command).returncode
    if code:
        print(f"scaling_groups.py ended with {code}", file=sys.stderr)


def batch(args: argparse.Namespace, folder: Path, end: float) -> list[dict[str, str]]:
    """A row for each layout."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{PROMPTS[n % len(PROMPTS)]} {n}\n" for n in range(args.videos)))
    rows = list[dict[str, str]]()
    for name, keys in LAYOUTS.items():
        if time.monotonic() > end:
            print(f"no time is left for the batch with {name}", file=sys.stderr)
            break
        out = folder / name.replace(" ", "-")
        command = [str(BIN / "mpirun"), "-n", str(args.ranks), sys.executable, "-m", "hpcdit", f"prompts={prompts}"]
        command += [f"output.dir={out}", "trace.level=0", *(key.format(ranks=args.ranks) for key in keys)]
        command += [f"model.path={args.model}"] * bool(args.model)
        if args.small:
            command += ["sampling.num_frames=5", "sampling.height=32", "sampling.width=32", "sampling.steps=2"]
        ended = subprocess.run(command, capture_output=True, text=True)
        log = (out / "run.log").read_text() if (out / "run.log").exists() else ""
        seconds, plan = re.search(r"videos took ([\d.]+) s", log), re.search(r"plan: (.*), about (.*?) without", log)
        if ended.returncode or seconds is None or plan is None:
            print(f"the batch with {name} ended with {ended.returncode}: {ended.stderr[-500:]}", file=sys.stderr)
            continue
        took = float(seconds[1])
        note = f"{args.videos * 3600 / took:.0f} videos/h"
        rows.append(row("batch", name, args.ranks, 1, plan[1], took, note=f"{note}; predicted {plan[2]}"))
    return rows


def row(what: str, case: str, ranks: int, nodes: int, method: str, seconds: float, note: str = "") -> dict[str, str]:
    values = (what, case, str(ranks), str(nodes), method, f"{seconds * 1e3:.3f}", "", "", note)
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: Sequence[dict[str, str]]) -> str:
    lines = [list(COLUMNS), *([r[c] for c in COLUMNS] for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(words: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(words)
    if args.ranks < 1 or args.ranks & (args.ranks - 1):
        print(f"--ranks: {args.ranks}; allowed: a power of two", file=sys.stderr)
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_file = folder / "rows.csv"
        groups(args, rows_file, args.limit_s * (0.7 if args.videos else 1))
        rows = list(csv.DictReader(rows_file.open())) if rows_file.exists() else []
        if args.videos:
            rows += batch(args, folder, start + args.limit_s)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(f"{time.monotonic() - start:.0f} s; {args.csv}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

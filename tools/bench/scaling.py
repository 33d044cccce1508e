"""How one host's ranks scale: a model's step, attention, and a batch, on all of them and on smaller groups.

python tools/bench/scaling.py --ranks 8                # 8 GPUs: under 10 minutes; the same again: what was left out
python tools/bench/scaling.py --ranks 8 --small        # a look at the program itself, on the CPU too

Steps and attention are run by scaling_groups.py under one mpirun: groups of 1, 2, 4 ... ranks, all ranks busy at the
same time, beside yunchang's USP where it is installed. The batch is the program itself, once as the planner likes it,
once with a video a rank, once with all ranks at each video. What is worth most comes first. Each row goes to --csv as
soon as it is there; of all rows in it the table is made. What fails or hangs costs its own row: the rest goes on in
new processes.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import scaling_rows
from scaling_rows import AUTO, Row
from watched import watched

from hpcdit.errors import InputError

HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
PROMPTS = tuple(f"a {c} {s} moving {d}" for c in ("red", "blue") for s in ("circle", "square") for d in ("left", "up"))
PARTS = "steps", "attention", "rivals", "batch"
BATCH = 0.23  # of the time, that is left to the batch
QUIET_S = 120.0  # without a new row: a start takes half a minute, and so does a step's first call, which compiles
BATCH_S = 150.0  # for a batch in one layout
OVER_S = 45.0  # after the limit all ends, whatever was begun in time
STARTS = 5  # of scaling_groups.py, at most


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of this host, a power of two")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, a list; default: %(default)s")
    parser.add_argument("--videos", type=int, default=16, help="of the batch; 0: no batch")
    parser.add_argument("--model", default="", help="of the batch: model.path; default: the demo")
    parser.add_argument("--limit-s", type=float, default=530, help="after which nothing new is begun")
    scaling_rows.add_options(parser)
    return parser


def checked(args: argparse.Namespace) -> list[str]:
    """The parts that are wanted. Raises InputError."""
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise InputError(f"--only: {', '.join(sorted(unknown)) or 'nothing'}; allowed: {', '.join(PARTS)}")
    scaling_rows.turns(args.groups, args.ranks)
    scaling_rows.sizes(args.sizes or "16x16")
    scaling_rows.lengths(args.lengths or "1")
    return [part for part in parts if part != "batch" or args.videos > 0]


def groups(args: argparse.Namespace, parts: Sequence[str], limit_s: float, last: float) -> bool:
    """Steps and attention. What was under way when processes ended is left out by the next, which do the rest.

    False: the input was bad, as they have said.
    """
    end, rows = time.monotonic() + limit_s, args.csv
    for _ in range(STARTS):
        command = [str(BIN / "mpirun"), "-n", str(args.ranks), sys.executable, str(HERE / "scaling_groups.py")]
        command += ["--csv", str(rows), "--only", ",".join(parts), "--until", str(end)]
        given = {name: getattr(args, name) for name in ("groups", "sizes", "lengths")}
        command += [word for name, value in given.items() if value for word in (f"--{name}", value)]
        before = len(scaling_rows.read(rows))
        why = watched([*command, *["--small"] * args.small], min(end + OVER_S, last), rows, QUIET_S)
        scaling_rows.settle(rows, why)
        if why == f"ended with {InputError.exit_code}":
            return False
        if not why:
            break
        print(f"scaling_groups.py: {why}", file=sys.stderr)
        if len(scaling_rows.read(rows)) == before or time.monotonic() > end:
            break  # it would fail in the same way again
    return True


def batch(args: argparse.Namespace, folder: Path, end: float, last: float) -> None:
    """A row for each layout that is not the planner's own."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{PROMPTS[n % len(PROMPTS)]} {n}\n" for n in range(args.videos)))
    case = f"{args.videos} videos of {Path(args.model).name or 'the demo'}"
    replicas = {AUTO: 0, "a video a rank": args.ranks, "all ranks a video": 1}
    for asked, count in replicas.items():
        done = scaling_rows.read(args.csv)
        cell = Row("batch", case, args.ranks, 1, asked)
        picked = done.get(replace(cell, asked=AUTO).key)
        if cell.key in done or (picked and picked.seconds and replicas_of(picked.plan) == count):
            continue
        if time.monotonic() > end:
            print(f"no time is left for the batch with {asked}", file=sys.stderr)
            return
        out = folder / asked.replace(" ", "-")
        command = [str(BIN / "mpirun"), "-n", str(args.ranks), sys.executable, "-m", "hpcdit", f"prompts={prompts}"]
        command += [f"output.dir={out}", "trace.level=0", *[f"parallel.replicas={count}"] * bool(count)]
        command += [f"model.path={args.model}"] * bool(args.model)
        tiny = ["sampling.num_frames=5", "sampling.height=32", "sampling.width=32", "sampling.steps=2"]
        command += tiny if args.small else ["model.dtype=bfloat16"]
        why = watched(command, min(time.monotonic() + BATCH_S, last))
        scaling_rows.add(args.csv, replace(cell, note=why) if why else rendered(cell, out, args.videos))


def replicas_of(plan: str) -> int:
    found = re.match(r"(\d+) replicas", plan)
    return int(found[1]) if found else 1


def rendered(cell: Row, out: Path, videos: int) -> Row:
    """The row of a batch that is done: its time as if all videos had taken as long as those after each group's first,
    which compiles."""
    log, files = (out / "run.log").read_text(), sorted((out / "videos").glob("*.h5"), key=lambda p: p.stat().st_mtime)
    took, plan = re.search(r"videos took ([\d.]+) s", log), re.search(r"plan: (.*), about .*? without", log)
    if not took or not plan or len(files) < videos:
        return replace(cell, note=f"{len(files)} of {videos} videos were made")
    with h5py.File(files[0]) as file:
        predicted = json.loads(file.attrs["plan"])["makespan_s"]
    seconds, first = float(took[1]), replicas_of(plan[1])
    note = f"{seconds:.1f} s with the first of each group"
    if videos > first:
        since = files[-1].stat().st_mtime - files[first - 1].stat().st_mtime
        seconds = since / (videos - first) * videos
    note = f"{videos * 3600 / seconds:.0f} videos/h; {note}"
    return replace(cell, plan=plan[1], seconds=seconds, predicted_s=predicted, note=note)


def main(words: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(words)
    start = time.monotonic()
    last = start + args.limit_s + OVER_S
    try:
        parts = checked(args)
        there = [row for row in scaling_rows.read(args.csv).values() if row.seconds]  # what failed is tried again
        scaling_rows.write(args.csv, there)
    except (InputError, OSError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return InputError.exit_code
    grouped = [part for part in parts if part != "batch"]
    if grouped and not groups(args, grouped, args.limit_s * (1 - BATCH * ("batch" in parts)), last):
        return InputError.exit_code
    if "batch" in parts:
        with tempfile.TemporaryDirectory() as name:
            batch(args, Path(name), start + args.limit_s, last)
    rows = list(scaling_rows.read(args.csv).values())
    print(scaling_rows.table(rows))
    print("\n".join([*scaling_rows.picks(rows), scaling_rows.goal(rows)]))
    print(f"{time.monotonic() - start:.0f} s; {args.csv}")
    return 0 if rows and all(row.seconds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What decode and write beside the denoising of the next video gain: the ranks' idle time, from the traces of a batch.

usage: python tools/bench/pipeline.py [--videos 20] [--ranks 2] [key=value ...]

Renders the same batch of the demo model twice: as the program does it, and with each video finished before the next
one begins. idle: the share of the ranks' time, between the first and the last step of the batch, in which they neither
denoise nor encode; encode: the share in which they encode.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

MODES = ("pipelined", "unpipelined")
CAPTION = "a red circle moving left on black"


def start(mode: str, overrides: Sequence[str]) -> int:
    """One rank's part of a run. Collective over all ranks that mpirun has started."""
    from hpcdit import app
    from hpcdit.cluster import World, finalize
    from hpcdit.render.stages import Denoised, Finisher

    if mode == "unpipelined":
        submit = Finisher.submit

        def alone(self: Finisher, video: Denoised) -> None:
            submit(self, video)
            self._running[-1].exception()

        Finisher.submit = alone  # type: ignore[method-assign]
    world = World()
    code = app.run(world, overrides)
    world.close()
    finalize(world.timeout_s)
    return code


def shares(folder: Path) -> tuple[float, float, float, float]:
    """(seconds a video, idle, of it inside videos, encode) of a run: the mean of its ranks, first step to last."""
    events, inside = [], 0.0
    for path in sorted((folder / "videos").glob("*.h5")):
        with h5py.File(path) as file:
            events.append(file["trace/events"][:])
        for rank in set(events[-1]["rank"]):
            own = events[-1][(events[-1]["name"] == b"step") & (events[-1]["rank"] == rank)]
            inside += own["end"].max() - own["start"].min() - (own["end"] - own["start"]).sum()
    every = np.concatenate(events)
    steps, encodes = every[every["name"] == b"step"], every[every["name"] == b"encode"]
    first, last = steps["start"].min(), steps["end"].max()
    window = (last - first) * len(set(steps["rank"]))
    encode = sum(max(0.0, e["end"] - max(e["start"], first)) for e in encodes)
    busy = float((steps["end"] - steps["start"]).sum())
    return (last - first) / len(events), 1 - (busy + encode) / window, inside / window, encode / window


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help="what mpirun starts")
    args, overrides = parser.parse_known_args(argv)
    if args.mode:
        return start(args.mode, overrides)
    print(f"| {args.ranks} ranks, {args.videos} videos | seconds a video | idle | of it inside videos | encode |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name, "prompts.txt")
        prompts.write_text(f"{CAPTION}\n" * args.videos)
        for mode in MODES:
            command = [str(Path(sys.executable).parent / "mpirun"), "-n", str(args.ranks), sys.executable, __file__]
            command += ["--mode", mode, f"prompts={prompts}", f"output.dir={name}/{mode}", "trace.level=1"]
            subprocess.run([*command, "parallel.replicas=1", *overrides], check=True, stdout=sys.stderr)
            each, *parts = shares(Path(name, mode))
            print(f"| {mode} | {each:.2f} | {' | '.join(f'{part:.1%}' for part in parts)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

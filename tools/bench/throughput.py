"""Videos an hour: a batch rendered by the program, and by diffusers' own pipeline in as many independent processes.

usage: python tools/bench/throughput.py [--videos 200] [--ranks 2] [key=value ...]

The same captions, seeds and settings of the demo model, a thread a process, one way after the other in the same run.
diffusers' processes each take every n-th video and save bare frames; the program writes its files as always. whole:
from the command line to the last file; videos: from when the models are loaded; cores: what of the processors' time
that took, start included, which does not depend on what else the machine does. apart: the largest difference of all
frames, in levels of 255.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice, product
from pathlib import Path

import h5py
import numpy as np

BIN = Path(sys.executable).parent
COLOURS = "red", "green", "blue", "yellow", "white", "orange"
SHAPES = "circle", "square", "triangle", "star"
WAYS = "left", "right", "up", "down"
GROUNDS = "black", "grey", "blue", "green"


def captions(count: int) -> list[str]:
    """`count` captions of the kind that the demo model was trained on; after 360 they come again."""
    every = [
        f"a {colour} {shape} moving {way} on {ground}"
        for ground, way, shape, colour in product(GROUNDS, WAYS, SHAPES, COLOURS)
        if colour != ground
    ]
    return list(islice(every * (count // len(every) + 1), count))


def diffuse(prompts: Path, folder: Path, part: int, parts: int, overrides: Sequence[str]) -> None:
    """Renders every `parts`-th video of the file with diffusers alone, into `folder`."""
    import diffusers
    import torch
    import transformers

    from hpcdit.config import demo_model, load, resolve_sampling
    from hpcdit.models.loading import inspect
    from hpcdit.render.manifest import read

    torch.set_num_threads(1)
    config = load(overrides)
    assert config is not None
    model = inspect(demo_model())
    jobs = read(prompts, resolve_sampling(config, model.family))
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline = getattr(diffusers, model.pipeline)
    pipe = pipeline.from_pretrained(model.path, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    for job in jobs[part::parts]:
        s = job.sampling
        video = pipe(
            job.prompt, job.negative_prompt, num_frames=s.num_frames, height=s.height, width=s.width,
            num_inference_steps=s.steps, guidance_scale=s.guidance_scale, max_sequence_length=s.max_sequence_length,
            generator=torch.Generator().manual_seed(s.seed), output_type="np",
        ).frames[0]  # fmt: skip
        np.save(folder / f"{job.id}.npy", (video * 255).round().astype(np.uint8))
    print(f"videos took {time.perf_counter() - start:.1f} s")


def by_diffusers(prompts: Path, folder: Path, processes: int, overrides: Sequence[str]) -> tuple[float, float]:
    """(whole, videos) seconds of independent processes."""
    folder.mkdir()
    start = time.perf_counter()
    command = [sys.executable, __file__, "--prompts", str(prompts), "--folder", str(folder)]
    runs = [
        subprocess.Popen([*command, "--part", f"{n}/{processes}", *overrides], stdout=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    said = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("diffusers failed")
    return time.perf_counter() - start, max(map(_videos_took, said))


def by_hpcdit(prompts: Path, folder: Path, ranks: int, overrides: Sequence[str]) -> tuple[float, float]:
    """(whole, videos) seconds of a run."""
    start = time.perf_counter()
    command = [str(BIN / "mpirun"), "-n", str(ranks), sys.executable, "-m", "hpcdit"]
    command += [f"prompts={prompts}", f"output.dir={folder}", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - start, _videos_took((folder / "run.log").read_text())


def _videos_took(said: str) -> float:
    found = re.search(r"videos took ([\d.]+) s", said)
    assert found, said
    return float(found[1])


def cores_s() -> float:
    """Seconds of the processors that all processes have taken which this one has started, and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def apart(ours: Path, theirs: Path) -> int:
    """The largest difference between the frames of both, in levels."""
    most = 0
    for path in theirs.glob("*.npy"):
        with h5py.File(ours / "videos" / f"{path.stem}.h5") as file:
            most = max(most, int(np.abs(file["frames"][:].astype(int) - np.load(path)).max()))
    return most


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    for name in ("--prompts", "--folder", "--part"):  # of a process of diffusers'
        parser.add_argument(name, help=argparse.SUPPRESS)
    given, overrides = parser.parse_known_args(words)
    if given.part:
        part, _, parts = given.part.partition("/")
        diffuse(Path(given.prompts), Path(given.folder), int(part), int(parts), overrides)
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"| {given.ranks} processes of one thread, {given.videos} videos | whole | videos | cores | videos an hour |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name, "prompts.txt")
        prompts.write_text("".join(f"{caption}\n" for caption in captions(given.videos)))
        for way, render in (("diffusers", by_diffusers), ("hpcdit", by_hpcdit)):
            before = cores_s()
            whole, videos = render(prompts, Path(name, way), given.ranks, overrides)
            hour = given.videos / whole * 3600
            print(f"| {way} | {whole:.1f} s | {videos:.1f} s | {cores_s() - before:.1f} s | {hour:.0f} |", flush=True)
        print(f"\n{apart(Path(name, 'hpcdit'), Path(name, 'diffusers'))} levels apart at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every model family under mpirun: all in one start."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcdit import app
from hpcdit.attention.methods import schedule
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.cluster import MPI, Cluster, World
from hpcdit.kernels import cpu
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.render.engine import stack
from hpcdit.transport.local import LocalTransport
from hpcdit.transport.mpi import WIRES, MpiTransport
from tests.attention_cases import UNTIMED
from tests.families import EXAMPLES, PROMPTS, picture
from tests.mpi.groups import each_size, side_by_side

# Examples that the whole program renders, too: one of each way in which families differ.
PROGRAM = (
    "wan-experts",
    "wan-image",
    "cogvideox-5b",
    "cogvideox15-image",
    "flux",
    "ltx",
    "hunyuanvideo",
    "hunyuanvideo15",
    "hunyuanvideo15-image",
    "mochi",
    "qwenimage",
)
LAYERS = "sharded", "host"  # by turns; the rest of this file has them resident
# By the number of ranks: ranks of a node, method, degrees. Every method on every number of them.
LAYOUTS = {
    1: [(1, "ulysses", 1, 1), (1, "ring", 1, 1), (1, "usp", 1, 1), (1, "tas", 1, 1), (1, "torus", 1, 1)],
    2: [(1, "ulysses", 2, 1), (2, "ring", 1, 2), (1, "usp", 1, 2), (2, "tas", 2, 1), (1, "torus", 2, 1)],
    3: [(1, "ulysses", 3, 1), (1, "ring", 1, 3), (2, "usp", 1, 3), (2, "tas", 3, 1), (1, "torus", 3, 1)],
    4: [(4, "ulysses", 4, 1), (2, "ring", 1, 4), (2, "usp", 2, 2), (2, "tas", 2, 2), (2, "torus", 2, 2)],
}
SEEDS = tuple(seed for _, _, seed in PROMPTS)
NEAR = 1e-4  # latents, of a deviation of about one, that are so near to others make the same levels


class Enough(Exception):
    """The latents after the first step have been seen."""


def frames(comm: MPI.Comm, folder: str) -> Any:
    """Renders each family's two prompts as one batch by every method on 1 to 4 ranks.

    folder: has the checkpoint <family>/ and <family>.npy of two videos' levels for each, and <family>,<scheduler>.npy
    of those by another scheduler, which one and two ranks make, too. Returns {ranks: {family or family,scheduler:
    (renders, levels, latents)}}, the largest differences that any rank saw: of levels, by the first method, and of the
    latents that all others make in the first step from those of the first.
    """
    torch.set_num_threads(1)
    families = [Family(Path(folder, name)) for name in sorted(EXAMPLES)]

    def body(world: World) -> Any:
        found = {family.name: [0, 0.0, 0.0] for family in families}
        for number, (per_node, method, ulysses, ring) in enumerate(LAYOUTS[world.size]):
            nodes, wire = Cluster(world, per_node), WIRES[number % 2]
            transport = MpiTransport(nodes, wire) if world.size > 1 else LocalTransport(torch.device("cpu"))
            for family in families:
                levels, apart = family.compare(schedule(method, ulysses, ring), transport, whole=number == 0)
                mine = found[family.name]
                found[family.name] = [mine[0] + 1, max(mine[1], levels), max(mine[2], apart)]
                for other in family.schedulers if number == 0 and world.size < 3 else ():
                    levels, apart = family.compare(schedule(method, ulysses, ring), transport, True, other)
                    found[f"{family.name},{other}"] = [1, levels, apart]
            nodes.close()
        return {
            name: (count, *(world.largest(worst, "the differences") for worst in differences))
            for name, (count, *differences) in found.items()
        }

    return each_size(comm, body, [(4,), (3, 1), (2,)])


class Family:
    """One family's checkpoint, loaded, with two encoded prompts."""

    def __init__(self, path: Path) -> None:
        self.name, self._example = path.name, EXAMPLES[path.name]
        self.schedulers = tuple(self._example.schedulers)
        self._expected = {"": np.load(path.with_suffix(".npy")).astype(int)}
        for other in self.schedulers:
            self._expected[other] = np.load(path.with_name(f"{path.name},{other}.npy")).astype(int)
        self._first = torch.empty(0)
        self._adapter = adapter = PipelineAdapter.load(inspect(path))
        example, guided = self._example, adapter.guided(self._example.scale)
        image = str(picture(path)) if example.image else ""
        self._conditions = stack([adapter.encode(text, no, guided, example.length, image) for text, no, _ in PROMPTS])
        self._noise = torch.cat([adapter.noise(seed, *example.size) for _, _, seed in PROMPTS])

    def compare(self, schedule: Any, transport: Any, whole: bool, scheduler: str = "") -> tuple[int, float]:
        """The differences of levels, of the video that is this rank's, and of latents; whole: this is the first."""
        of, example = self._adapter.shape, self._example
        shape = Shape(len(PROMPTS), of.length(*example.size, example.length), of.heads, of.head_dim)
        parallel = SequenceParallel(schedule, shape, transport, cpu, torch.float32, UNTIMED, of.token_channels)
        apart = 0.0

        def on_step(step: int, snapshot: Any) -> None:
            nonlocal apart
            if whole and step == 0 and not scheduler:
                self._first = snapshot().latents
            elif not whole:
                apart = float(abs(snapshot().latents - self._first).max())
                raise Enough

        with suppress(Enough):
            settings = example.steps, example.scale, parallel, on_step
            latents = self._adapter.denoise(self._conditions, self._noise, *settings, seeds=SEEDS, scheduler=scheduler)
        parallel.close()
        if not whole:
            return 0, apart
        mine = transport.rank % 2
        decoded = self._adapter.decode(latents[mine : mine + 1]).astype(int)
        return int(abs(decoded - self._expected[scheduler][mine]).max()), 0.0


def scheduler_of(name: str) -> str:
    """That by which the program renders an example: another than its own for each second one that knows others."""
    return next(iter(EXAMPLES[name].schedulers), "") if PROGRAM.index(name) % 2 else ""


def program(comm: MPI.Comm, folder: str) -> Any:
    """The program on two ranks, both prompts in one batch, each half of guidance on a rank where there are two."""
    codes = {}
    for number, name in enumerate(PROGRAM):
        example = EXAMPLES[name]
        shared: dict[str, Any] = dict(zip(("num_frames", "height", "width"), example.size, strict=True))
        shared |= {"steps": example.steps, "guidance_scale": example.scale, "max_sequence_length": example.length}
        if other := scheduler_of(name):
            shared["scheduler"] = other
        if example.image:
            shared["image"] = f"{name}.png"  # beside the prompts file
        own = [{"prompt": prompt, "negative_prompt": no, "seed": seed, "id": str(seed)} for prompt, no, seed in PROMPTS]
        lines = [{**each, **shared} for each in own]
        prompts = Path(folder) / f"{name}.jsonl"
        if comm.rank == 0:
            prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = [f"model.path={folder}/{name}", f"prompts={prompts}", f"output.dir={folder}/{name}-out"]
        args += [
            f"model.layers={LAYERS[number % len(LAYERS)]}",
            "parallel.batch=2",
            "parallel.replicas=1",
            f"parallel.cfg={2 if example.guided else 1}",
        ]
        comm.Barrier()
        (codes[name],) = side_by_side(comm, [[(2, lambda world: app.run(world, args))]])  # noqa: B023
    return codes

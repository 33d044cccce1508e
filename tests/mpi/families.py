"""Every model family under mpirun: all in one start."""

import json
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
from hpcdit.transport.mpi import MpiTransport
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
    "mochi",
    "qwenimage",
)
# Ranks: of one node, or of nodes of one rank each; methods with their degrees.
LAYOUTS = {
    1: [(1, "ulysses", 1, 1)],
    2: [(2, "ring", 1, 2), (1, "torus", 2, 1)],
    3: [(1, "ulysses", 3, 1), (2, "usp", 1, 3), (2, "tas", 3, 1)],
}


def frames(comm: MPI.Comm, folder: str) -> Any:
    """Renders each family's two prompts as one batch, on 1, 2 and 3 ranks: {family: {ranks: (renders, levels)}}.

    folder: has the checkpoint <family>/ and <family>.npy of two videos' levels for each. The levels are the largest
    difference that any rank saw.
    """
    torch.set_num_threads(1)
    found: dict[str, dict[int, Any]] = {}
    for name in sorted(path.stem for path in Path(folder).glob("*.npy")):
        example, adapter = EXAMPLES[name], PipelineAdapter.load(inspect(Path(folder) / name))
        expected = np.load(f"{folder}/{name}.npy").astype(int)
        guided = adapter.guided(example.scale)
        image = str(picture(Path(folder) / name)) if example.image else ""
        conditions = stack([adapter.encode(prompt, no, guided, example.length, image) for prompt, no, _ in PROMPTS])
        noise = torch.cat([adapter.noise(seed, *example.size) for _, _, seed in PROMPTS])
        of, seeds = adapter.shape, tuple(seed for _, _, seed in PROMPTS)
        shape = Shape(len(PROMPTS), of.length(*example.size, example.length), of.heads, of.head_dim)

        def body(world: World) -> tuple[int, int]:
            worst = 0
            for per_node, method, ulysses, ring in LAYOUTS[world.size]:
                nodes = Cluster(world, per_node)
                plan, transport = schedule(method, ulysses, ring), MpiTransport(nodes)
                parallel = SequenceParallel(plan, shape, transport, cpu, torch.float32, UNTIMED, of.token_channels)  # noqa: B023
                settings = example.steps, example.scale, parallel, lambda *_: None  # noqa: B023
                latents = adapter.denoise(conditions, noise, *settings, seeds=seeds)  # noqa: B023
                parallel.close()
                nodes.close()
                mine = world.rank % 2
                levels = adapter.decode(latents[mine : mine + 1]).astype(int)  # noqa: B023
                worst = max(worst, int(abs(levels - expected[mine]).max()))  # noqa: B023
            return len(LAYOUTS[world.size]), int(world.largest(worst, "the differences"))

        found[name] = each_size(comm, body, [(3,), (2, 1)])
    return found


def program(comm: MPI.Comm, folder: str) -> Any:
    """The program on two ranks, both prompts in one batch, each half of guidance on a rank where there are two."""
    codes = {}
    for name in PROGRAM:
        example = EXAMPLES[name]
        shared: dict[str, Any] = dict(zip(("num_frames", "height", "width"), example.size, strict=True))
        shared |= {"steps": example.steps, "guidance_scale": example.scale, "max_sequence_length": example.length}
        if example.image:
            shared["image"] = f"{name}.png"  # beside the prompts file
        own = [{"prompt": prompt, "negative_prompt": no, "seed": seed, "id": str(seed)} for prompt, no, seed in PROMPTS]
        lines = [{**each, **shared} for each in own]
        prompts = Path(folder) / f"{name}.jsonl"
        if comm.rank == 0:
            prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = [f"model.path={folder}/{name}", f"prompts={prompts}", f"output.dir={folder}/{name}-out"]
        args += ["parallel.batch=2", "parallel.replicas=1", f"parallel.cfg={2 if example.guided else 1}"]
        comm.Barrier()
        (codes[name],) = side_by_side(comm, [[(2, lambda world: app.run(world, args))]])  # noqa: B023
    return codes

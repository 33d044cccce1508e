"""The model's weights once a host: one of its ranks makes what has to be made, all of them map it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..cluster import World
from ..config import Model
from ..models import pipeline_of
from ..models.base import Adapter
from ..models.loading import ModelFolder
from ..models.lora import Lora
from ..models.staging import readable, staged, told_of
from ..stop import StopRequest


def load_model(
    world: World, folder: ModelFolder, model: Model, stop: StopRequest, load: Callable[[ModelFolder], Adapter]
) -> Adapter:
    """What `load` makes of the folder; collective over the world.

    Raises InputError or Stopped on all ranks where one of them does.
    """
    leader = world.hosts.index(world.hosts[world.rank])
    what = "the model"

    def stage() -> Path:
        torch.set_num_threads(world.cores)
        lora = Lora.read(Path(model.lora[0]), float(model.lora[1]), pipeline_of(folder.family)) if model.lora else None
        shared = world.hosts.count(world.hosts[world.rank]) > 1
        return stack.enter_context(staged(folder, model.dtype, lora, shared))

    def load_from(place: Path) -> Adapter:
        if not readable(place):  # in a container of its own a rank does not see the leader's memory
            place = stage()
        return load(replace(folder, path=place))

    with ExitStack() as stack:
        mine = world.together(lambda: stop.leave(stage) if world.rank == leader else folder.path, what)
        every = world.gather(str(mine).encode(), 0, what)
        place = Path(world.broadcast([path.decode() for path in every], what)[leader])
        with told_of(place, folder.path):
            return world.together(lambda: stop.leave(lambda: load_from(place)), what)

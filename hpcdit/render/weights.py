"""The model's weights once a host: one of its ranks makes what has to be made, all of them map it."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from ..cluster import Cluster, World
from ..config import Model
from ..models import pipeline_of
from ..models.base import Adapter
from ..models.loading import ModelFolder
from ..models.lora import Lora
from ..models.staging import readable, staged, told_of
from ..stop import StopRequest
from ..transport import Network
from ..transport.shelf import room
from .plan import itemsize


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
        return stack.enter_context(staged(folder, model.dtype, lora, shared, model.layers != "resident"))

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


def on_heap(folder: ModelFolder, model: Model, held: int) -> int:
    """Bytes of a GPU's symmetric memory for layers that `held` ranks hold together: somewhat more than they will take,
    since a model keeps some numbers in float32 whatever the rest is in."""
    if model.layers != "sharded":
        return 0
    return room([int(n * itemsize(model.dtype) * 1.02) + (1 << 18) for n in folder.layers], held)


def shelve(cluster: Cluster, adapter: Adapter, network: Network, place: str, stop: StopRequest) -> None:
    """Puts the layers where `model.layers` says; collective over the world, of which `cluster` has the nodes.

    Raises InputError or Stopped on all ranks where one of them does.
    """
    layers, what = adapter.layers, "the layers"
    assert layers is not None
    shelf = network.shelf(cluster, layers.sizes, place)
    cluster.world.together(lambda: stop.leave(lambda: layers.put(shelf)), what)
    shelf.filled()
    adapter.bring_layers(shelf)

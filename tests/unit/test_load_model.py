"""The model's weights where ranks of a host do not see each other's memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdit.config import Model
from hpcdit.models.base import Adapter
from hpcdit.models.loading import ModelFolder, inspect
from hpcdit.render.weights import load_model
from hpcdit.stop import StopRequest
from tests.checkpoints import make_wan


class Second:
    """The second rank of a host, to which the first has told `place`."""

    rank, hosts, cores = 1, [0, 0], 1

    def __init__(self, place: Path) -> None:
        self.place = place

    def together(self, body: Callable[[], Any], what: str) -> Any:
        return body()

    def gather(self, data: bytes, root: int, what: str) -> list[bytes]:
        return []

    def broadcast(self, value: Any, what: str) -> Any:
        return [str(self.place), "-"]


@pytest.mark.parametrize("there", [True, False])
def test_a_rank_that_cannot_read_the_first_one_s_weights_makes_its_own(there: bool, tmp_path: Path) -> None:
    make_wan(tmp_path / "model")
    folder = inspect(tmp_path / "model")
    place = tmp_path / "place"
    if there:
        place.symlink_to(folder.path)
    seen = list[Path]()

    def load(found: ModelFolder) -> Adapter:
        assert list(found.path.glob("transformer/*.safetensors"))
        seen.append(found.path)
        return None  # type: ignore[return-value]

    world: Any = Second(place)
    model = Model(
        "demo",
        None,
        "bfloat16",
        "cpu",
        compile=False,
        graph=False,
        layers="resident",
        lora=None,
        sampling={},
        shape=None,
    )
    load_model(world, folder, model, StopRequest(), load)
    assert len(seen) == 1 and (seen[0] == place) == there

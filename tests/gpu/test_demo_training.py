"""The demo model's training program on a GPU."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.require import needs
from tests.unit.test_demo_training import tiny, trained
from tools.demo_model.training import averaged

pytestmark = needs("gpu", "" if torch.cuda.is_available() else "no CUDA device")


@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_learn_what_is_learned_without(tmp_path: Path, autocast: bool) -> None:
    options: dict[str, Any] = {"device": "cuda", "autocast": autocast, "compile": False}
    learned: list[dict[str, Tensor]] = []
    for name, graph in (("graph", True), ("as it comes", False), ("other seed", False)):
        made = tiny(tmp_path / name, graph=graph, seed=8 if name == "other seed" else 7, **options)
        for stage in ("vae_pictures", "vae_clips"):  # what the transformer learns from is to be the same
            if learned:
                made.folder.mkdir(exist_ok=True)
                shutil.copy(tmp_path / "graph" / f"{stage}.safetensors", made.folder)
        assert trained(made)
        learned.append(averaged(made.folder / "text.safetensors", "transformer"))
    captured, plain, other = (torch.cat([x.flatten() for x in weights.values()]) for weights in learned)
    assert (captured - plain).norm() < 0.05 * (other - plain).norm()

"""A checkpoint whose parts do not fit each other is refused when it is loaded, in one line that names the part."""

import shutil
from pathlib import Path

import pytest

from hpcdit.config import demo_model
from hpcdit.errors import InputError
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from tests.checkpoints import edit, make_wan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("wan") / "whole")


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        PipelineAdapter.load(inspect(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_checkpoint_is_loaded(whole: Path) -> None:
    assert PipelineAdapter.load(inspect(whole)).shape.heads == 5


def test_weights_are_counted_before_they_are_loaded(whole: Path) -> None:
    for folder in (inspect(whole), inspect(demo_model())):
        pipe = PipelineAdapter.load(folder)._pipe
        for part, count in folder.weights.items():
            tensors = getattr(pipe, part).state_dict(keep_vars=True).values()
            assert count == sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values()), part


def test_weights_of_another_part_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "wan")
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors")
    said = refused(folder)
    assert "text_encoder: its files lack the tensor" in said and "more; allowed: files of one model" in said


def test_tensors_that_the_configuration_has_no_place_for_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "wan")
    edit(folder / "transformer/config.json", cross_attn_norm=False)
    assert "transformer: its config.json has no place for the tensor" in refused(folder)


def test_what_diffusers_cannot_load_is_one_line(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "wan")
    edit(folder / "transformer/config.json", ffn_dim=45)
    assert f"{folder}: diffusers cannot load it: " in refused(folder)

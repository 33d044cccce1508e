"""A LoRA changes a model's weights as diffusers' own loader changes them, for every family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hpcdit.models import pipeline_of
from hpcdit.models.loading import ModelFolder, inspect
from hpcdit.models.lora import Lora
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.models.staging import staged
from tests.families import EXAMPLES
from tests.families import pipeline_of as example_pipeline

SCALE, RANK = 0.7, 3
# Linear layers of attention and beside. Of Wan, diffusers empties what a LoRA has for add_k_proj without add_v_proj.
TARGETS = r".*(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj|proj_out|net\.0\.proj)"
# Layers in the authors' keys, and what they are in diffusers; and what they call A and B.
AUTHORS = {
    "wan-experts": (
        {
            "diffusion_model.blocks.0.self_attn.q": "blocks.0.attn1.to_q",
            "diffusion_model.blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
        },
        ("lora_down", "lora_up"),
    ),
    "flux": (
        {
            "lora_unet_double_blocks_1_img_attn_proj": "transformer_blocks.1.attn.to_out.0",
            "lora_unet_single_blocks_0_linear2": "single_transformer_blocks.0.proj_out",
        },
        ("lora_down", "lora_up"),
    ),
}


def examples() -> list[str]:
    """One of each pipeline for which diffusers loads LoRAs."""
    first = {example_pipeline(name): name for name in reversed(EXAMPLES)}
    return [name for pipeline, name in first.items() if hasattr(getattr(diffusers, pipeline), "load_lora_weights")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    place, found = tmp_path_factory.mktemp("models"), {}
    for name in examples():
        EXAMPLES[name].make(place / name)
        found[name] = inspect(place / name)
    return found


def weights_of(pipe: Any, folder: ModelFolder) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": x for part in folder.weights for name, x in getattr(pipe, part).state_dict().items()}


def compare(folder: ModelFolder, path: Path) -> set[str]:
    """Compares what diffusers makes of all weights with what we do; returns the names of those that changed."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder.path)
    before = {name: tensor.clone() for name, tensor in weights_of(pipe, folder).items()}
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=["transformer"], lora_scale=SCALE)
    pipe.unload_lora_weights()
    theirs = weights_of(pipe, folder)
    with staged(folder, "float32", Lora.read(path, SCALE, pipeline_of(folder.family)), shared=False) as place:
        adapter: Any = PipelineAdapter.load(replace(folder, path=place))
    ours = weights_of(adapter._pipe, folder)
    assert ours.keys() == theirs.keys() == before.keys()
    apart = {name: float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items()}
    assert max(apart.values()) < 1e-5, max(apart, key=lambda name: apart[name])
    return {name for name, tensor in theirs.items() if not torch.allclose(tensor, before[name], atol=1e-3)}


@pytest.mark.parametrize("name", examples())
def test_what_diffusers_saved_is_fused_as_diffusers_fuses_it(
    name: str, folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(folders[name].path)
    model = pipe.transformer
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=5, target_modules=TARGETS))
    factors = get_peft_model_state_dict(model)
    random = torch.Generator().manual_seed(0)
    for key, factor in factors.items():
        factors[key] = torch.randn(factor.shape, generator=random)
    said = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=factors, **said)
    changed = compare(folders[name], tmp_path / "pytorch_lora_weights.safetensors")
    assert len(changed) == len(factors) // 2 > 5


@pytest.mark.parametrize("name", AUTHORS)
def test_the_keys_of_a_model_s_authors_mean_what_diffusers_takes_them_for(
    name: str, folders: dict[str, ModelFolder], tmp_path: Path
) -> None:
    layers, (down, up) = AUTHORS[name]
    weights = load_file(folders[name].path / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors, random = dict[str, torch.Tensor](), torch.Generator().manual_seed(0)
    for theirs, ours in layers.items():
        rows, columns = weights[f"{ours}.weight"].shape
        tensors[f"{theirs}.{down}.weight"] = torch.randn(RANK, columns, generator=random)
        tensors[f"{theirs}.{up}.weight"] = torch.randn(rows, RANK, generator=random)
        tensors[f"{theirs}.alpha"] = torch.tensor(5.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = compare(folders[name], tmp_path / "lora.safetensors")
    assert changed == {f"transformer.{layer}.weight" for layer in layers.values()}

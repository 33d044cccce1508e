"""A LoRA is fused as its formula says, whatever its keys are called; staged weights are what diffusers would load."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from hpcdit.errors import InputError
from hpcdit.models.loading import ModelFolder, inspect
from hpcdit.models.lora import Lora, with_lora
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.models.staging import staged
from tests.checkpoints import MODEL_WEIGHTS, make_wan

LAYERS = ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj")
AUTHORS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0")
RANK, ALPHA, SCALE = 3, 6.0, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return inspect(make_wan(tmp_path_factory.mktemp("wan") / "model", max_shard_size="50KB"))


@pytest.fixture(scope="module")
def weights(folder: ModelFolder) -> dict[str, torch.Tensor]:
    shards = (folder.path / MODEL_WEIGHTS).parent.glob("*.safetensors")
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def factors(weights: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    shapes = [weights[f"{layer}.weight"].shape for layer in LAYERS]
    return [
        (torch.randn(RANK, columns, generator=random), torch.randn(rows, RANK, generator=random))
        for rows, columns in shapes
    ]


def write(path: Path, form: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Writes the pairs in one of the forms; returns alpha / r as it then is."""
    prefix, names, ab, alpha = {
        "diffusers": ("transformer.", LAYERS, ("lora_A", "lora_B"), None),
        "metadata": ("transformer.", LAYERS, ("lora_A", "lora_B"), None),
        "peft": ("base_model.model.", LAYERS, ("lora_A.default", "lora_B.default"), None),
        "bare": ("", LAYERS, ("lora.down", "lora.up"), ALPHA),
        "authors": ("diffusion_model.", AUTHORS, ("lora_down", "lora_up"), ALPHA),
    }[form]
    tensors, metadata = dict[str, torch.Tensor](), None
    for name, (down, up) in zip(names, pairs, strict=True):
        tensors |= {f"{prefix}{name}.{ab[0]}.weight": down, f"{prefix}{name}.{ab[1]}.weight": up}
        if alpha:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    if form == "metadata":
        said = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
        metadata = {"lora_adapter_metadata": json.dumps(said)}
    if form == "peft":
        path.with_name("adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    save_file(tensors, path, metadata)
    return 1.0 if form == "diffusers" else ALPHA / RANK


@pytest.mark.parametrize("form", ["diffusers", "metadata", "peft", "bare", "authors"])
def test_a_lora_is_fused_whatever_its_keys_are_called(
    form: str, folder: ModelFolder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path, pairs = tmp_path / "adapter_model.safetensors", factors(weights)
    factor = write(path, form, pairs) * SCALE
    with staged(folder, "float32", Lora.read(path, SCALE, WanPipeline), shared=False) as place:
        adapter = PipelineAdapter.load(replace(folder, path=place))
    found: dict[str, torch.Tensor] = adapter._pipe.transformer.state_dict()
    for layer, (down, up) in zip(LAYERS, pairs, strict=True):
        expected = weights[f"{layer}.weight"] + factor * (up @ down)
        torch.testing.assert_close(found[f"{layer}.weight"], expected)
        assert (found[f"{layer}.weight"] - weights[f"{layer}.weight"]).abs().max() > 0.1
    changed = {f"{layer}.weight" for layer in LAYERS}
    assert all(torch.equal(found[name], weights[name]) for name in weights.keys() - changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_staged_weights_are_what_diffusers_loads_and_no_rank_has_its_own(folder: ModelFolder, dtype: str) -> None:
    expected = PipelineAdapter.load(folder, dtype)
    with staged(folder, dtype, None, shared=True) as place:
        assert (place == folder.path) == (dtype == "float32")
        found = PipelineAdapter.load(replace(folder, path=place), dtype)
        lines = Path("/proc/self/maps").read_text().splitlines()
    assert place == folder.path or not place.exists()
    ours_alone = [line for line in lines if "memfd:hpcdit" in line or line.endswith(".safetensors")]
    mapped = [[int(n, 16) for n in line.split()[0].split("-")] for line in ours_alone]
    for part in folder.weights:
        theirs, ours = (getattr(pipe, part).state_dict() for pipe in (expected._pipe, found._pipe))
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), (part, name)
            assert any(start <= ours[name].data_ptr() < end for start, end in mapped), (part, name)


def test_a_lora_that_does_not_fit_is_refused_in_one_line(folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, path)
        with pytest.raises(InputError) as caught:
            with_lora(folder, str(path), 1.0)
            with staged(folder, "float32", Lora.read(path, 1.0, WanPipeline), shared=False):
                pass
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    def pair(name: str, rows: int = 70, columns: int = 70) -> dict[str, Any]:
        return {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}

    assert "no such layer" in refused(pair("transformer.blocks.9.attn1.to_q"))
    assert "has shape [70, 70]" in refused(pair("transformer.blocks.0.attn1.to_q", 69))
    assert "no tensor of it is a LoRA's" in refused({"a.weight": torch.ones(2)})
    whole = pair("transformer.blocks.0.attn1.to_q")
    assert "of the same rank" in refused(dict(list(whole.items())[:1]))
    assert "not a part of a plain LoRA" in refused({**whole, "transformer.blocks.0.lora_magnitude": torch.ones(2)})
    assert "cannot convert" in refused(pair("diffusion_model.nothing"))
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"^model\.lora: .*not a safetensors file"):
        with_lora(folder, str(path), 1.0)
    with pytest.raises(InputError, match=r"^model\.lora: .*no such file$"):
        with_lora(folder, str(path.with_name("none.safetensors")), 1.0)


def test_the_fingerprint_tells_loras_and_scales_apart(
    folder: ModelFolder, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    write(path, "diffusers", factors(weights))
    prints = {with_lora(folder, str(path), scale).fingerprint for scale in (0.5, 1.0)} | {folder.fingerprint}
    assert len(prints) == 3

import inspect as python
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from hpcdit.models.families import wan_configs as configs
from hpcdit.models.families.wan import FAMILY
from hpcdit.models.loading import ModelShape, inspect, shape
from tests.checkpoints import make_wan

pytestmark = pytest.mark.usefixtures("one_thread")


def test_defaults_for_keys_that_a_configuration_leaves_out_are_those_of_diffusers() -> None:
    for ours, theirs in (
        (configs.TRANSFORMER_DEFAULTS, WanTransformer3DModel),
        (configs.VAE_DEFAULTS, AutoencoderKLWan),
    ):
        parameters = python.signature(theirs.__init__).parameters
        defaults = {name: parameters[name].default for name in ours}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()} == ours


def test_a_random_checkpoint_is_whole_and_of_the_sizes_asked_for(tmp_path: Path) -> None:
    folder = inspect(make_wan(tmp_path, heads=3, head_dim=10, layers=4, rope_rows=20, z_dim=5))
    assert shape(folder) == ModelShape(4, 3, 10, 5, (1, 2, 2), 4, 8, 20, 16, ffn_dim=44)


def test_a_random_checkpoint_is_the_same_each_time_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    prints = [inspect(make_wan(tmp_path / name, seed=len(name))).fingerprint for name in ("a", "b", "cc")]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_checkpoint_may_be_sharded_and_in_half_precision(tmp_path: Path) -> None:
    folder = inspect(make_wan(tmp_path, max_shard_size="200KB", dtype="bfloat16"))
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in folder.files
    WanPipeline.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("scheduler", FAMILY.components["scheduler"].classes)
def test_every_scheduler_that_passes_the_check_renders(tmp_path: Path, scheduler: str) -> None:
    make_wan(tmp_path, scheduler=scheduler)
    inspect(tmp_path)
    assert render(tmp_path, "a red cat", seed=0, steps=1).std() > 20


def test_frames_of_a_random_checkpoint_vary_with_place_time_seed_and_prompt(tmp_path: Path) -> None:
    make_wan(tmp_path)
    clip = render(tmp_path, "a red cat", seed=0)
    assert clip.shape == (9, 48, 80, 3)
    assert clip.std(axis=(1, 2)).min() > 20
    assert clip.std(axis=0).mean() > 20
    assert np.abs(clip - render(tmp_path, "a red cat", seed=1)).mean() > 20
    assert np.abs(clip - render(tmp_path, "a blue star", seed=0)).mean() > 5


def test_a_token_that_attention_loses_shows_in_the_frames(tmp_path: Path) -> None:
    def lose_last(to_v: torch.nn.Module, args: object, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :-1], 0 * value[:, -1:]], dim=1)

    make_wan(tmp_path)
    whole, lossy = render(tmp_path, "a red cat", seed=0), render(tmp_path, "a red cat", seed=0, to_v=lose_last)
    assert np.abs(whole - lossy).mean() > 5


def render(folder: Path, prompt: str, seed: int, steps: int = 2, to_v: Any = None) -> np.ndarray:
    """Frames in levels, from diffusers' own pipeline; to_v: a hook on the values of self-attention."""
    pipe = WanPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    for block in pipe.transformer.blocks if to_v else ():
        block.attn1.to_v.register_forward_hook(to_v)
    video = pipe(
        prompt,
        num_frames=9,
        height=48,
        width=80,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=40,
    )
    return 255 * video.frames[0]

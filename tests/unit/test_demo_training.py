"""The demo model's training program, at sizes that a CPU trains in seconds."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from tools.demo_model import whole


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RESIDUAL = dict(base_dim=6, is_residual=True, in_channels=12, out_channels=12, patch_size=2, dim_mult=[1, 2, 2],
                temperal_downsample=[True, True])  # fmt: skip
PLAIN = dict(base_dim=6, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True])


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("form", [RESIDUAL, PLAIN], ids=["2.2", "2.1"])
def test_whole_clips_give_what_the_vae_gives_chunk_by_chunk(form: dict[str, Any], frames: int) -> None:
    torch.manual_seed(0)
    numbers = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    theirs: Any = AutoencoderKLWan(**form, z_dim=4, num_res_blocks=1, **numbers)
    ours: Any = AutoencoderKLWan(**form, z_dim=4, num_res_blocks=1, **numbers)
    ours.load_state_dict(theirs.state_dict())
    whole.whole(ours)
    clips = torch.rand(2, 3, frames, 16, 24) * 2 - 1

    wanted = theirs.encode(clips).latent_dist
    mean, log_variance = whole.encode(ours, clips)
    assert torch.allclose(mean, wanted.mean, atol=2e-6) and torch.allclose(log_variance, wanted.logvar, atol=2e-6)
    picture = whole.decode(ours, mean).clamp(-1, 1)  # theirs is clamped
    assert torch.allclose(picture, theirs.decode(wanted.mean).sample, atol=2e-6)

    target = torch.rand_like(clips)
    (picture - target).square().sum().backward()
    (theirs.decode(wanted.mean).sample - target).square().sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        if gradients[name] is None:  # of the convolutions over time, where there is one frame
            assert weight.grad is None and "time_conv" in name
        else:
            scale = float(gradients[name].abs().max())
            assert torch.allclose(weight.grad, gradients[name], atol=1e-4 * scale + 1e-6), name

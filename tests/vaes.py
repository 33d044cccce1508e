"""Tiny random VAEs of diffusers' own classes, of the forms that checkpoints have."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)

NORMS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


def wan() -> Any:
    return AutoencoderKLWan(base_dim=6, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, **NORMS,
                            temperal_downsample=[True, True])  # fmt: skip


def wan22() -> Any:
    return AutoencoderKLWan(base_dim=6, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, **NORMS, is_residual=True,
                            temperal_downsample=[True, True], in_channels=12, out_channels=12,
                            patch_size=2)  # fmt: skip


def cogvideox() -> Any:
    return AutoencoderKLCogVideoX(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
                                  latent_channels=4, temporal_compression_ratio=4,
                                  down_block_types=("CogVideoXDownBlock3D",) * 3,
                                  up_block_types=("CogVideoXUpBlock3D",) * 3)  # fmt: skip


def hunyuan() -> Any:
    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
                                     latent_channels=4)  # fmt: skip


def hunyuan15() -> Any:
    return AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4,
                                       spatial_compression_ratio=8)  # fmt: skip


def mochi() -> Any:
    return AutoencoderKLMochi(latent_channels=4, encoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
                              decoder_block_out_channels=(32,) * 4)  # fmt: skip


def ltx() -> Any:
    return AutoencoderKLLTXVideo(latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                                 layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
                                 spatio_temporal_scaling=(True, True, False, False),
                                 decoder_spatio_temporal_scaling=(True, True, False, False),
                                 decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
                                 upsample_factor=(1,) * 4, patch_size=2)  # fmt: skip


def ltx_noise() -> Any:
    """As of LTX 0.9.1: with a timestep, and noise in the decoder."""
    return AutoencoderKLLTXVideo(latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8, 16, 32),
                                 layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
                                 spatio_temporal_scaling=(True, True, True, False),
                                 decoder_spatio_temporal_scaling=(True,) * 3,
                                 decoder_inject_noise=(True, True, True, False), upsample_residual=(True,) * 3,
                                 upsample_factor=(2,) * 3, timestep_conditioning=True, patch_size=1)  # fmt: skip


VAES: dict[str, Callable[[], Any]] = {
    "wan": wan, "wan22": wan22, "cogvideox": cogvideox, "hunyuan": hunyuan, "hunyuan15": hunyuan15,
    "mochi": mochi, "ltx": ltx, "ltx_noise": ltx_noise,
}  # fmt: skip
SPATIAL = dict.fromkeys(VAES, 8) | {"wan": 4, "cogvideox": 4}
FRAMES = dict.fromkeys(VAES, (5, 9)) | {"mochi": (2, 7)}  # latent frames that it decodes, frames that it encodes


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """One of VAES, every parameter random; the same wherever it is made."""
    torch.manual_seed(sum(map(ord, name)))
    vae = VAES[name]().eval().to(dtype)
    for parameter in vae.parameters():
        if parameter.numel() > 1 and parameter.std() == 0:  # ones and zeros would hide what is done twice or never
            parameter.data += torch.randn_like(parameter) * 0.3
    return vae.requires_grad_(False)

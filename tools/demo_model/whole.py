"""diffusers' Wan VAE on whole clips at once: the same numbers, fast enough to train.

diffusers goes through a clip chunk by chunk and carries what a causal convolution needs of the last chunk in a cache.
On a whole clip all modules but one do the same without it; that one, WanResample, leaves its convolution over time out
where there is no cache. `whole` gives it one that does not.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor


class _WholeResample(WanResample):
    """A WanResample that is given all frames: the first of them stays one frame, the others are halved or doubled."""

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        if self.mode == "upsample3d" and x.shape[2] > 1:
            two = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            x = torch.cat([x[:, :, :1], two.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        batch, _, frames, _, _ = x.shape
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
        if self.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


def whole(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Makes a VAE one for `encode` and `decode` below, in place; it is no longer one for its own methods."""
    for module in vae.modules():
        if type(module) is WanResample:
            module.__class__ = _WholeResample  # same weights, same names: copies and files stay as they are
    return vae


def encode(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents, [B, z, t, h, w] each, of clips [B, 3, T, H, W] with T = 4 t - 3."""
    if vae.config.patch_size is not None:
        clips = patchify(clips, vae.config.patch_size)
    mean, log_variance = vae.quant_conv(vae.encoder(clips)).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips of latents, not clamped to [-1, 1]; the inverse of `encode`'s mean as far as the VAE has learned it."""
    clips = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return clips if vae.config.patch_size is None else unpatchify(clips, vae.config.patch_size)

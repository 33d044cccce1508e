"""The demo model's parts, as diffusers and transformers make them, with the little that training adds."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .captions import COLOURS, GROUNDS, MOTIONS, SHAPES
from .settings import Settings

WORDS = ("a", "and", "on", *COLOURS, *SHAPES, *sorted({w for m in MOTIONS for w in m.split()}), *GROUNDS)
SLOTS = 16  # of text in training: the longest caption has 14 tokens, and the last slot is always padding
SHIFT = 3.0  # of the times at which rendering evaluates the model


def vae(settings: Settings) -> Any:
    """A fresh VAE, whose convolutions over time begin as copies of the newest frame."""
    z = settings.vae["z_dim"]
    made: Any = AutoencoderKLWan(**settings.vae, latents_mean=[0.0] * z, latents_std=[1.0] * z)
    with torch.no_grad():
        for name, module in made.named_modules():
            if name.endswith("time_conv"):
                weight = module.weight.mul_(0.1)
                eye = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
                weight[:, :, -1, 0, 0] += eye
                module.bias.zero_()
    return made


def transformer(settings: Settings, image: bool) -> Any:
    """A fresh transformer. With an image it takes, beside the latents, a mask of four channels and the image's."""
    z = settings.vae["z_dim"]
    channels = 2 * z + settings.vae["scale_factor_temporal"] if image else z
    width = settings.text_encoder["d_model"]
    return WanTransformer3DModel(in_channels=channels, out_channels=z, text_dim=width, **settings.transformer)


def text_encoder(settings: Settings) -> Any:
    made = UMT5Config(
        vocab_size=len(_vocabulary()),
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **settings.text_encoder,
    )
    return UMT5EncoderModel(made)


def tokenizer() -> Any:
    """One token a word; unknown words are all alike, and an end mark closes each caption."""
    words = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def tokens(captions: Sequence[str]) -> Tensor:
    """Captions in as many slots as training has: int64 [B, 16], 0 where there is no word."""
    rows = tokenizer()(list(captions), padding="max_length", max_length=SLOTS, return_tensors="pt")
    return rows.input_ids


def prepared(mask: Tensor) -> Tensor:
    """Which slots hold a word, bool [B, S], as the text encoder takes it without looking whether all do: that waits."""
    away = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return away[:, None, None].expand(-1, 1, mask.shape[1], -1)


def _vocabulary() -> dict[str, int]:
    return {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}


class Padded(WanAttnProcessor):
    """Cross-attention to 16 slots that stand for any number of them.

    Pipelines fill up with zeros and mask nothing, so that all padding is one key and value, many times: as a bias of
    log(n) on the logit of the last slot, n of them cost what one does.
    """

    bias: Tensor | None = None

    def pad(self, lengths: Tensor) -> None:
        """For the next batch: how many slots rendering would have, for each clip, at least 16."""
        self.bias = torch.zeros(len(lengths), 1, 1, SLOTS, device=lengths.device)
        self.bias[..., -1] = torch.log(lengths - SLOTS + 1.0)[:, None, None]

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: None = None, rotary_emb: None = None) -> Tensor:  # fmt: skip
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def padded(model: Any) -> Padded:
    """Gives a transformer's cross-attention a processor for training, and returns it."""
    processor = Padded()
    for block in model.blocks:
        block.attn2.set_processor(processor)
    return processor


def widened(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """A text-to-video transformer's weights for one with more input channels, which it begins by ignoring."""
    weight = weights["patch_embedding.weight"]
    wide = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    wide[:, : weight.shape[1]] = weight
    return {**weights, "patch_embedding.weight": wide}


def pipeline(vae: Any, transformer: Any, text_encoder: Any) -> Any:
    """Text to video, or image to video where the transformer takes more than latents; no CLIP encoder is needed."""
    text = transformer.config.in_channels == vae.config.z_dim
    made: Any = (WanPipeline if text else WanImageToVideoPipeline)(
        tokenizer=tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    made.set_progress_bar_config(disable=True)
    return made

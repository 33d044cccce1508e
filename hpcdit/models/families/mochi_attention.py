"""The attention of a Mochi transformer, of a batch in one call."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: None,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """MochiAttnProcessor2_0's steps on [B, tokens, C] of video and of text: the two as they come out.

    That one calls torch's attention for each video of a batch, without the text's padding; `split` leaves the padding
    out by itself, for all videos at once. What comes out for padding nobody looks at.
    """
    tables = tuple(table.unsqueeze(0) for table in image_rotary_emb)
    layers = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers[0])
    text_q, text_k, text_v = (layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers[1])
    q, k = _turned(attn.norm_q(q), *tables), _turned(attn.norm_k(k), *tables)
    q, k, v = (
        torch.cat(parts, dim=1).transpose(1, 2)
        for parts in ((q, attn.norm_added_q(text_q)), (k, attn.norm_added_k(text_k)), (v, text_v))
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
    for layer in attn.to_out:
        video = layer(video)
    return video, text if attn.context_pre_only else attn.to_add_out(text)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x, [B, tokens, H, D]; tables: [1, tokens, H, D/2], since each head has its own."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], -1).flatten(-2)

"""Joint attention of video and text, for families whose own processors do more than attend.

They look at the mask, which makes the host wait for the device, or turn by complex numbers, which torch.compile leaves
as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Joint:
    """The processor of an attention layer of diffusers that has projections of its own for text.

    Its steps are diffusers' own, without what is done about the text's padding: `split` leaves that out as keys, for
    all videos of a batch at once, and what comes out for it nobody looks at.
    """

    def __init__(self, turned: Callable[[Tensor, Any], Tensor], text: bool = False) -> None:
        """turned: the rotary embedding of x, [B, tokens, H, D], by the tables that the transformer gives.

        text: whether these are two, for video and for text.
        """
        self._turned, self._text = turned, text

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: Any,
        encoder_hidden_states_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of [B, tokens, C] of video and of text: the two as they come out."""
        layers = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers[0])
        text_q, text_k, text_v = (layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers[1])
        tables, text_tables = image_rotary_emb if self._text else (image_rotary_emb, None)
        q, k = (self._turned(x, tables) for x in (attn.norm_q(q), attn.norm_k(k)))
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        if self._text:
            text_q, text_k = (self._turned(x, text_tables) for x in (text_q, text_k))
        pairs = (q, text_q), (k, text_k), (v, text_v)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        for layer in attn.to_out:
            video = layer(video)
        return video, text if attn.context_pre_only else attn.to_add_out(text)


def turned(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x, [B, tokens, H, D], turned pair by pair, in float32; tables: cos and sin, [tokens, H or 1, D/2]."""
    cos, sin = tables
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)], -1).flatten(-2)

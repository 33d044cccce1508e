"""What stands in for parts of a Wan transformer: attention over several ranks."""

from typing import Any

import torch
from torch import Tensor

from ..split import VIDEO, Split


def share(model: Any, split: Split) -> None:
    """Lets a transformer compute one rank's tokens."""
    attention, cross = Attention(split), Cross(split)
    for block in model.blocks:
        block.attn1.set_processor(attention)
        block.attn2.set_processor(cross)

    def here() -> slice:
        return slice(split.sequence.tokens.start, split.sequence.tokens.stop)

    def halved(rope: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cuts the rotary tables, [1, L, 1, D] with each value twice, down to [tokens, 1, D/2]."""
        cos, sin = tables
        return cos[0, here(), :, 0::2].contiguous(), sin[0, here(), :, 1::2].contiguous()

    def of_tokens(embedder: Any, args: Any, found: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Cuts embeddings of timesteps where each token has its own, as in Wan 2.2 5B: [B, L, C]."""
        times, others = found[:2], found[2:]
        return *(x[:, here()] if x is not None and x.ndim == 3 else x for x in times), *others

    model.rope.register_forward_hook(halved)
    model.condition_embedder.register_forward_hook(of_tokens)
    split.blocks(model.blocks, {"hidden_states": VIDEO})
    split.end(model.proj_out)


class Attention:
    """The processor of every self-attention: each of q, k, v leaves for the other ranks as soon as it is there."""

    def __init__(self, split: Split) -> None:
        self._split = split

    @torch.compiler.disable  # what it publishes, others wait for: nothing that a compiler may move
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Self-attention of [B, tokens, C]: WanAttnProcessor's steps, each part published at once."""
        sequence = self._split.sequence
        for name in sequence.tensors:
            layer = getattr(attn, f"to_{name}")
            if name == "v":
                sequence.project(name, hidden_states, layer.weight, layer.bias)
            else:
                x, norm = layer(hidden_states).unflatten(2, (attn.heads, -1)), getattr(attn, f"norm_{name}")
                sequence.publish(name, x, (norm.weight, norm.eps), rotary_emb)
        out = sequence.attend().flatten(2).type_as(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out


class Cross:
    """The processor of every cross-attention: WanAttnProcessor's steps, with the kernels of self-attention.

    Each rank has all tokens of the text. What torch chooses by itself is half as quick on an H100.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        rotary_emb: None,
    ) -> Tensor:
        """Cross-attention of [B, tokens, C] to the text, [B, text tokens, C]; or a picture and 512 tokens of text."""
        q, text = attn.norm_q(attn.to_q(hidden_states)), encoder_hidden_states
        picture, text = (text[:, :-512], text[:, -512:]) if attn.add_k_proj is not None else (None, text)
        out = self._attended(attn, q, attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if picture is not None:
            added = self._attended(attn, q, attn.norm_added_k(attn.add_k_proj(picture)), attn.add_v_proj(picture))
            out = out + added
        for layer in attn.to_out:
            out = layer(out)
        return out

    def _attended(self, attn: Any, *parts: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in parts)
        return self._attend(q, k, v).flatten(2).type_as(q)

    @torch.compiler.disable  # the kernels' libraries are not for tracing
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._split.sequence.attend_whole(q, k, v)

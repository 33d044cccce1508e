"""What stands in for parts of a Wan transformer: attention over several ranks, and what a GPU computes in one call."""

from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor

from .base import Sequence


class Split:
    """Lets a transformer compute one rank's tokens; is itself the processor of every self-attention.

    `sequence` is that of the video at hand: there while `Wan.denoise` runs.
    """

    sequence: Sequence

    def __init__(self, model: Any) -> None:
        cross = Cross(self)
        for block in model.blocks:
            block.attn1.set_processor(self)
            block.attn2.set_processor(cross)
        model.blocks[0].register_forward_pre_hook(self._keep)
        model.rope.register_forward_hook(self._cut)
        model.proj_out.register_forward_hook(self._gather)

    def _keep(self, block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, *others = args
        return (hidden_states[:, self._slice], *others)

    def _cut(self, rope: Any, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cuts the rotary tables, [1, L, 1, D] with each value twice, down to [tokens, 1, D/2]."""
        cos, sin = tables
        return cos[0, self._slice, :, 0::2].contiguous(), sin[0, self._slice, :, 1::2].contiguous()

    def _gather(self, proj_out: Any, args: Any, output: Tensor) -> Tensor:
        return self.sequence.gather(output)

    @property
    def _slice(self) -> slice:
        return slice(self.sequence.tokens.start, self.sequence.tokens.stop)

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
        for name in self.sequence.tensors:
            layer = getattr(attn, f"to_{name}")
            if name == "v":
                self.sequence.project(name, hidden_states, layer.weight, layer.bias)
            else:
                x, norm = layer(hidden_states).unflatten(2, (attn.heads, -1)), getattr(attn, f"norm_{name}")
                self.sequence.publish(name, x, (norm.weight, norm.eps), rotary_emb)
        out = self.sequence.attend().flatten(2).type_as(hidden_states)
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
        """Cross-attention of [B, tokens, C] to the text, [B, text tokens, C]."""
        q, text = attn.norm_q(attn.to_q(hidden_states)), encoder_hidden_states
        parts = q, attn.norm_k(attn.to_k(text)), attn.to_v(text)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in parts)
        out = self._attend(q, k, v).flatten(2).type_as(hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out

    @torch.compiler.disable  # the kernels' libraries are not for tracing
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._split.sequence.attend_whole(q, k, v)


class GeluProjection(torch.nn.Module):
    """diffusers' GELU, a linear layer and the tanh approximation of GELU, as one matrix product on a GPU.

    cuBLASLt applies bias and GELU to the sums before they are rounded and stored. On a CPU the operator is the exact
    GELU, another function.
    """

    def __init__(self, proj: torch.nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        rows = torch._addmm_activation(self.proj.bias, x.flatten(0, -2), self.proj.weight.t(), use_gelu=True)
        return rows.unflatten(0, x.shape[:-1])


def compile_blocks(transformer: Any) -> None:
    """For a GPU: what torch.compile makes of the blocks, and what it does not fuse by itself.

    GELU in halves, that is: how exactly cuBLASLt takes the tanh in float32 is not said.
    """
    for block in transformer.blocks:
        first = block.ffn.net[0]
        tanh = isinstance(first, GELU) and first.approximate == "tanh" and first.proj.bias is not None
        if tanh and first.proj.weight.dtype in (torch.float16, torch.bfloat16):
            block.ffn.net[0] = GeluProjection(first.proj)
        block.compile(dynamic=False)

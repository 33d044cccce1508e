"""A transformer that computes one rank's tokens: cut before its first block, shared in attention, whole at its end.

Nothing of a model is written again. A family's own attention processors run as they are, on the tokens of one rank;
what they ask torch's `scaled_dot_product_attention` is answered by all ranks together. Where text and video are
attended jointly, the text's tokens are tokens of the sequence like all others, and are cut along with it: each is
attended once, whatever the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .base import Sequence


class Part(Enum):
    """Of which tokens something has a row each: of the video, of the text, or of both as the sequence has them."""

    VIDEO = "video"
    TEXT = "text"
    BOTH = "both"


@dataclass(frozen=True)
class Cut:
    """part: the tokens that dimension `dim` is of; tables may be tuples of such tensors, or missing."""

    part: Part
    dim: int = 1


VIDEO, TEXT, BOTH = (Cut(part) for part in Part)


class Split:
    """What of a transformer is cut along tokens, by torch's hooks; `sequence` is there while videos are denoised."""

    sequence: Sequence

    def __init__(self) -> None:
        self.text_first = False
        self._text = self._video = 0  # tokens of the pass at hand

    def blocks(self, blocks: Any, first: Mapping[str, Cut], every: Mapping[str, Cut] | None = None) -> None:
        """Cuts arguments of blocks, by name: those in `first` for the first block alone, since it gives them on."""
        for i, block in enumerate(blocks):
            names = tuple(signature(block.forward).parameters)
            cuts = {**(first if i == 0 else {}), **(every or {})}
            counted = i == 0

            def before(
                block: Any, args: Any, kwargs: Any, names: Any = names, cuts: Any = cuts, counted: bool = counted
            ) -> tuple[tuple[()], dict[str, Any]]:
                named = {**dict(zip(names, args, strict=False)), **kwargs}
                if counted:
                    self._count(first, named)
                return (), {name: self.cut(x, cuts[name]) if name in cuts else x for name, x in named.items()}

            block.register_forward_pre_hook(before, with_kwargs=True)

    def share(self, attention: Any) -> None:
        """Makes this attention that of all ranks' tokens."""
        compute = attention.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Answered(self):
                return compute(*args, **kwargs)

        attention.forward = torch.compiler.disable(forward)  # others wait for what it publishes

    def end(self, module: Any) -> None:
        """Brings the video's tokens, which are what `module` gives out, together on all ranks."""
        module.register_forward_hook(lambda module, args, output: self._whole(output))

    def cut(self, x: Any, cut: Cut) -> Any:
        """This rank's part of x."""
        if not isinstance(x, Tensor):
            return x if x is None else type(x)(self.cut(each, cut) for each in x)
        here, total = self.sequence.tokens, self._text + self._video
        start, count = {
            Part.BOTH: (0, total),
            Part.TEXT: (0 if self.text_first else self._video, self._text),
            Part.VIDEO: (self._text if self.text_first else 0, self._video),
        }[cut.part]
        first, last = (min(max(at - start, 0), count) for at in (here.start, here.stop))
        return x.narrow(cut.dim, first, last - first)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As torch's: attention of this rank's queries, [B, H, tokens, D], to the keys of all ranks.

        attn_mask: which of all L keys count, of type bool, [B, 1, 1, L]. Raises ValueError for what is not supported.
        """
        if dropout_p or is_causal or scale is not None or enable_gqa:
            raise ValueError("attention over several ranks has no dropout, causal mask, scale or shared heads")
        keys = None
        if attn_mask is not None:
            total = self._text + self._video
            if attn_mask.dtype != torch.bool or attn_mask.shape != (len(query), 1, 1, total):
                raise ValueError(f"a mask of type {attn_mask.dtype}, {list(attn_mask.shape)}; allowed: one of keys")
            keys = attn_mask[:, 0, 0]
        parts = {"q": query, "k": key, "v": value}
        for name in self.sequence.tensors:
            self.sequence.publish(name, parts[name].transpose(1, 2))
        return self.sequence.attend(keys).transpose(1, 2)

    def _count(self, first: Mapping[str, Cut], named: Mapping[str, Any]) -> None:
        found = {part: 0 for part in Part}
        for name, cut in first.items():
            if isinstance(named.get(name), Tensor):
                found[cut.part] = named[name].shape[cut.dim]
        self._text, self._video = found[Part.TEXT], found[Part.VIDEO]

    def _whole(self, x: Tensor) -> Tensor:
        here = len(self.sequence.tokens)
        missing = here - x.shape[1]  # rows for tokens of the text, which nobody looks at
        at = (missing, 0) if self.text_first else (0, missing)
        whole = self.sequence.gather(F.pad(x, (0, 0, *at)) if missing else x)
        start = self._text if self.text_first else 0
        return whole[:, start : start + self._video]


class _Answered(TorchFunctionMode):
    """In its body, `split` answers what is asked of torch's attention."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._split.attend if func is F.scaled_dot_product_attention else func
        return answer(*args, **(kwargs or {}))

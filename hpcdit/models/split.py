"""A transformer that computes one rank's tokens: cut before its first block, shared in attention, whole at its end.

Nothing of a model is written again. A family's own attention processors run as they are, on the tokens of one rank;
what they ask torch's `scaled_dot_product_attention` is answered by all ranks together. Where text and video are
attended jointly, the text's tokens are tokens of the sequence like all others, and each rank has its part of them: each
is attended once, whatever the method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from inspect import signature
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..kernels.base import Counted
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
Cuts = Mapping[str, Cut | tuple[Cut, ...]]  # by the names of arguments; several: of the parts of a tuple


class Split:
    """What of a transformer is cut along tokens, by torch's hooks; `sequence` is there while videos are denoised."""

    sequence: Sequence

    def __init__(self) -> None:
        self.number = next(_numbers)
        _splits[self.number] = self
        self.text_first = False  # where attention has both
        self.text_everywhere = False  # whether the blocks fail where there is no text
        self._text = self._video = 0  # tokens of the pass at hand
        self._mask: Tensor | None = None  # what says which of the text's count as keys, where the blocks are not told
        self._keys: Counted | None = None  # and which of them all do

    def hide(self, model: Any, mask: str) -> None:
        """Keeps an argument of the model, by name, for its blocks (see `blocks`): the model does not look at it."""
        compute = model.forward

        @wraps(compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._mask = kwargs.pop(mask, None)
            return compute(*args, **kwargs)

        model.forward = forward

    def blocks(self, blocks: Any, first: Cuts | None = None, every: Cuts | None = None, mask: str = "") -> None:
        """Cuts arguments of blocks, by name: those in `first` for the first block alone, since it gives them on.

        mask: an argument that says which keys count: of the text, [B, tokens], or of all, [B, 1, 1, L].
        """
        for i, block in enumerate(blocks):
            names = tuple(signature(block.forward).parameters)
            starts = first if i == 0 else None
            cuts = {**(starts or {}), **(every or {})}

            def before(
                block: Any, args: Any, kwargs: Any, names: Any = names, cuts: Any = cuts, starts: Any = starts
            ) -> tuple[tuple[()], dict[str, Any]]:
                named = {**dict(zip(names, args, strict=False)), **kwargs}
                if starts:
                    self._count(starts, named, self._mask if named.get(mask) is None else named[mask])
                if mask:
                    named[mask] = None
                return (), {name: self.cut(x, cuts[name]) if name in cuts else x for name, x in named.items()}

            block.register_forward_pre_hook(before, with_kwargs=True)

    def share(self, attention: Any) -> None:
        """Makes this attention that of all ranks' tokens."""
        compute, answered = attention.forward, _Answered(self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with answered:
                return compute(*args, **kwargs)

        attention.forward = forward

    def end(self, module: Any) -> None:
        """Brings the video's tokens, which are what `module` gives out, together on all ranks."""
        module.register_forward_hook(lambda module, args, output: self._whole(output))

    def cut(self, x: Any, cut: "Cut | tuple[Cut, ...]") -> Any:
        """This rank's part of x."""
        if not isinstance(x, Tensor):
            cuts = cut if isinstance(cut, tuple) else (cut,) * len(x or ())
            return x if x is None else tuple(self.cut(each, own) for each, own in zip(x, cuts, strict=True))
        assert isinstance(cut, Cut)
        text, video = self._share(self.sequence.tokens)
        if cut.part is Part.TEXT:
            return x.narrow(cut.dim, text.start, len(text))
        if cut.part is Part.VIDEO:
            return x.narrow(cut.dim, video.start, len(video))
        at = (0, self._text) if self.text_first else (self._video, 0)
        both = [x.narrow(cut.dim, at[0] + text.start, len(text)), x.narrow(cut.dim, at[1] + video.start, len(video))]
        return torch.cat(both if self.text_first else both[::-1], cut.dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's queries to the keys of all ranks; [B, tokens, H, D] each."""
        parts = {"q": q, "k": k, "v": v}
        for name in self.sequence.tensors:
            self.sequence.publish(name, parts[name])
        return self.sequence.attend(self._keys)

    @torch.compiler.disable  # `attend` looks at what it finds, and compiled code would note that in the end only
    def _count(self, first: Mapping[str, Cut], named: Mapping[str, Any], mask: Tensor | None) -> None:
        found = {part: 0 for part in Part}
        for name, cut in first.items():
            if isinstance(named.get(name), Tensor):
                found[cut.part] = named[name].shape[cut.dim]
        self._text, self._video = found[Part.TEXT], found[Part.VIDEO]
        if self.text_everywhere and not all(len(self._share(part)[0]) for part in self.sequence.shares):
            raise ValueError(f"{self._text} tokens of text; allowed: one a rank at least")
        self._keys = None if mask is None else Counted(self._joint(mask))

    def _share(self, tokens: range) -> tuple[range, range]:
        """The tokens of the text, and those of the video, of the rank that has these tokens of the sequence.

        Each rank has as large a part of the text as of the sequence: attention does not care for the order of keys.
        """
        first, last = (n * self._text // (self._text + self._video) for n in (tokens.start, tokens.stop))
        return range(first, last), range(tokens.start - first, tokens.stop - last)

    def _joint(self, mask: Tensor) -> Tensor:
        """Which of all keys count, in the sequence's order, where the video's do."""
        if mask.ndim == 4:
            mask = mask[:, 0, 0, : self._text] if self.text_first else mask[:, 0, 0, self._video :]
        found = []
        for part in self.sequence.shares:
            text, video = self._share(part)
            both = [mask[:, text.start : text.stop].bool(), mask.new_ones((len(mask), len(video)), dtype=torch.bool)]
            found += both if self.text_first else both[::-1]
        return torch.cat(found, dim=1)

    def _whole(self, x: Tensor) -> Tensor:
        missing = len(self.sequence.tokens) - x.shape[1]  # rows for tokens of the text, which nobody looks at
        whole = self.sequence.gather(F.pad(x, (0, 0, *((missing, 0) if self.text_first else (0, missing)))))
        if not self._text:
            return whole
        parts = []
        for part in self.sequence.shares:
            start = part.start + (len(self._share(part)[0]) if self.text_first else 0)
            parts.append(whole[:, start : start + len(self._share(part)[1])])
        return torch.cat(parts, dim=1)


# An operator is given numbers and tensors only: its split by its number.
_numbers, _splits = count(), WeakValueDictionary[int, Split]()


@torch.library.custom_op("hpcdit::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, split: int) -> Tensor:
    """`Split.attend` as one operator: what others wait for and what waits for others stays in it, compiled or not."""
    return _splits[split].attend(q, k, v).contiguous()


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, split: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


class _Answered(TorchFunctionMode):
    """In its body, a split answers what is asked of torch's attention."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self._split = split.number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._answer(*args, **(kwargs or {}))
        if func is Tensor.unflatten:  # written in Python, by way of what torch.compile does not follow
            return args[0].unflatten(*args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _answer(
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

        Raises ValueError for what is not supported.
        """
        if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
            raise ValueError("attention over several ranks has no dropout, mask, scale or shared heads")
        # Compiled, what makes them writes them so; else it is a copy where heads come before tokens.
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return _attend(q, k, v, self._split).transpose(1, 2)

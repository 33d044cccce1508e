"""Classifier-free guidance: which rank computes which of the two predictions that a pipeline asks for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Encoding, Halves


class Guidance:
    """Stands for a transformer's own `forward`, in one of the two ways in which pipelines ask for two predictions.

    One after the other, that with the prompt first: each half of a group computes its own when the first is asked for,
    and they swap; the second question is answered by what is there already. Or both at once, as one batch of twice as
    many rows, those with the negative prompt first: each row's half computes it; without halves the two are computed
    one after the other, as many videos at a time as there are.
    """

    def __init__(self, model: Any, asked: Mapping[str, str]) -> None:
        """asked: see Family.asked."""
        self._compute, self._asked = model.forward, asked
        self._halves: Halves | None = None
        self._negative: Encoding | None = None
        self._unasked: Tensor | None = None
        self._like = torch.Size()
        model.forward = self

    def begin(self, halves: Halves | None, negative: Encoding | None, like: torch.Size) -> None:
        """For the videos at hand. Without a negative prompt every question is computed as it comes.

        like: the shape of their latents, in which predictions are swapped.
        """
        self._halves, self._negative, self._unasked, self._like = halves, negative, None, like

    def __call__(self, **inputs: Any) -> Any:
        if self._negative is None:
            return self._compute(**inputs)
        if len(inputs["hidden_states"]) == 2 * self._like[0]:
            return (self._both(inputs),)
        if self._halves is None:
            return self._compute(**inputs)
        if self._unasked is not None:
            prediction, self._unasked = self._unasked, None
            return (prediction,)
        if self._halves.index == 1:
            theirs = {name: self._negative[key] for key, name in self._asked.items()}
            inputs |= {name: x if inputs[name] is None else x.to(inputs[name].dtype) for name, x in theirs.items()}
        first, self._unasked = self._swapped(self._halves, inputs)
        return (first,)

    def _both(self, inputs: dict[str, Any]) -> Tensor:
        """The predictions of a batch that holds both."""
        count = self._like[0]

        def rows(first: int) -> dict[str, Any]:
            return {
                name: x[first : first + count] if isinstance(x, Tensor) and x.ndim and len(x) == 2 * count else x
                for name, x in inputs.items()
            }

        if self._halves is None:
            return torch.cat([self._compute(**rows(first))[0] for first in (0, count)])
        positive, negative = self._swapped(self._halves, rows(count if self._halves.index == 0 else 0))
        return torch.cat([negative, positive])

    def _swapped(self, halves: Halves, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(positive, negative); inputs: of this half's own."""
        (mine,) = self._compute(**inputs)
        theirs = halves.swap(mine.reshape(self._like)).view(mine.shape)
        return (mine, theirs) if halves.index == 0 else (theirs, mine)

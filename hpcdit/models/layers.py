"""A transformer's layers where they do not lie: each is brought while the one before it computes.

What a layer's parameters point to changes, the layer does not. Two buffers are enough, since a layer is brought into
the one that the last layer has left.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ALIGN = 256  # bytes: what kernels load at a time is a part of it


class Shelf(Protocol):
    """Where the layers are, see transport.shelf.Shelf."""

    @property
    def on_device(self) -> bool: ...

    def mine(self, layer: int) -> Tensor | None: ...

    def fetch(self, layer: int, into: Tensor) -> Callable[[], None]: ...


@dataclass(eq=False)
class Buffer:
    """bytes: as many as the largest layer has; layer: which is there, or under way until `arrive` was called."""

    bytes: Tensor
    layer: int = -1
    arrive: Callable[[], None] | None = None


@dataclass(eq=False)
class Layer:
    """A block of a transformer. loaded: its parameters, and their values until these are on the shelf."""

    block: nn.Module
    following: int
    loaded: list[tuple[nn.Parameter, Tensor]]
    nbytes: int = 0
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by buffer

    def __post_init__(self) -> None:
        self.nbytes = sum(_padded(values.nbytes) for _, values in self.loaded)

    def values(self, memory: Tensor) -> list[Tensor]:
        """The parameters' values in `memory`, which has them one after the other."""
        found, at = [], 0
        for _, like in self.loaded:
            found.append(memory[at : at + like.nbytes].view(like.dtype).view(like.shape))
            at += _padded(like.nbytes)
        return found

    def forget(self) -> None:
        """Lets go of the parameters' values."""
        self.loaded = [(parameter, values.new_empty(values.shape, device="meta")) for parameter, values in self.loaded]

    def point(self, values: Sequence[Tensor]) -> None:
        for (parameter, _), value in zip(self.loaded, values, strict=True):
            parameter.data = value


class Layers:
    """The layers of a model's transformers, numbered one transformer after the other.

    When it is made, the layers are taken out of the model: what moves the model to a device leaves them behind. `put`
    brings them onto a shelf, and has the model find them there from then on.
    """

    def __init__(self, transformers: Iterable[Sequence[nn.Module]]) -> None:
        """transformers: of each its layers in the order in which they compute."""
        self._layers = list[Layer]()
        for blocks in transformers:
            first = len(self._layers)
            for number, block in enumerate(blocks):
                loaded = [(parameter, parameter.data) for parameter in block.parameters()]
                layer = Layer(block, first + (number + 1) % len(blocks), loaded)
                layer.point([values.new_empty(0) for _, values in loaded])
                self._layers.append(layer)
        self._buffers = list[Buffer]()
        self._busy: Buffer | None = None  # of the layer that computes

    @property
    def sizes(self) -> list[int]:
        """Bytes of each."""
        return [layer.nbytes for layer in self._layers]

    def has(self, parameter: nn.Parameter) -> bool:
        """Whether it is one of a layer's."""
        return any(parameter is mine for layer in self._layers for mine, _ in layer.loaded)

    def put(self, shelf: Shelf) -> None:
        """Copies onto the shelf what is this rank's there. Each layer is let go of when it is not needed any more: all
        of them lie twice nowhere."""
        mine = [(layer, shelf.mine(number)) for number, layer in enumerate(self._layers)]
        for layer, memory in mine:
            if memory is None:
                layer.forget()
        for layer, memory in mine:
            if memory is not None:
                for there, (_, values) in zip(layer.values(memory), layer.loaded, strict=True):
                    there.copy_(values)
                layer.forget()

    def start(self, shelf: Shelf, device: torch.device) -> None:
        """From here on the model computes with what is on the shelf, which all ranks have put there.

        What this rank has itself is used where it lies, if that is the device's memory; the rest is fetched.
        """
        self._shelf, fetched = shelf, list[int]()
        for number, layer in enumerate(self._layers):
            memory = shelf.mine(number) if shelf.on_device else None
            if memory is not None:
                layer.point(layer.values(memory))
            else:
                fetched.append(number)
        nbytes = max((self._layers[number].nbytes for number in fetched), default=0)
        self._buffers = [Buffer(torch.empty(nbytes, dtype=torch.uint8, device=device)) for _ in range(2)]
        for number in fetched:
            layer = self._layers[number]
            while layer.following not in fetched:
                layer.following = self._layers[layer.following].following
            for which, buffer in enumerate(self._buffers):
                layer.views[which] = layer.values(buffer.bytes)
            layer.block.register_forward_pre_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        @torch.compiler.disable  # which buffer it is, is not for tracing
        def enter(block: nn.Module, args: Any) -> None:
            self._enter(number)

        return enter

    def _enter(self, number: int) -> None:
        """The parameters of a layer that is about to compute are there; the next one of its transformer sets out."""
        layer = self._layers[number]
        buffer = self._with(number) or self._bring(number)
        if buffer.arrive:
            arrive, buffer.arrive = buffer.arrive, None
            arrive()
        layer.point(layer.views[self._buffers.index(buffer)])
        self._busy = buffer
        if self._with(layer.following) is None:
            self._bring(layer.following)

    def _with(self, number: int) -> Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.layer == number), None)

    def _bring(self, number: int) -> Buffer:
        """Begins to bring a layer into the buffer that no layer computes with."""
        buffer = next(buffer for buffer in self._buffers if buffer is not self._busy)
        if buffer.arrive:  # of a pass that failed, or of another transformer
            buffer.arrive()
        buffer.layer, buffer.arrive = -1, None  # not there if this fails
        buffer.arrive = self._shelf.fetch(number, buffer.bytes[: self._layers[number].nbytes])
        buffer.layer = number
        return buffer


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN

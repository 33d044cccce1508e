"""What the engine asks of a model family, and what a model family asks of sequence-parallel attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device

    from ..kernels.base import Counted, Norm, Tables
    from ..spans import Spans
    from ..transport.base import Traffic
    from .layers import Layers, Shelf
    from .loading import ModelFolder, ModelShape


class Sequence(Protocol):
    """Attention over the tokens of one video that are shared out among the ranks of a group.

    Where a model attends video and text jointly, the text's tokens are among them.

    Each layer is one round: three times `publish` or `project`, then `attend`. All ranks go through the same rounds.
    """

    @property
    def tokens(self) -> range:
        """This rank's tokens among all L."""

    @property
    def shares(self) -> tuple[range, ...]:
        """All ranks' tokens."""

    @property
    def tensors(self) -> str:
        """q, k and v in the order in which they are best published."""

    @property
    def spans(self) -> "Spans":
        """Where the times of passes go, see `graphs.Passes`."""

    @property
    def traffic(self) -> "Traffic":
        """Where the bytes that passes move are counted."""

    def publish(self, name: str, x: "Tensor", norm: "Norm | None" = None, tables: "Tables | None" = None) -> None:
        """Gives this rank's "q", "k" or "v", [B, tokens, H, D]; each once a round.

        norm, tables: an RMS norm and a rotary embedding that it gets on its way.
        """

    def project(self, name: str, x: "Tensor", weight: "Tensor", bias: "Tensor") -> None:
        """As `publish` of what a linear layer makes of x, [B, tokens, C]; weight: [H * D, C], bias: [H * D]."""

    def attend(self, keys: "Counted | None" = None) -> "Tensor":
        """The attention of this rank's queries to all keys: [B, tokens, H, D].

        keys: those that count, where not all do.
        """

    def attend_whole(self, q: "Tensor", k: "Tensor", v: "Tensor") -> "Tensor":
        """The attention of this rank's q to keys that are all here, of a text: [B, tokens, H, D] each."""

    def gather(self, x: "Tensor") -> "Tensor":
        """All ranks' tokens, [B, L, C], on every rank; `x`: this rank's, [B, tokens, C]. The end of a pass."""


class Halves(Protocol):
    """Two groups of ranks that denoise the same videos, each computing one of the two predictions of guidance."""

    @property
    def index(self) -> int:
        """0: this rank's half computes the prediction with the prompt; 1: with the negative prompt."""

    def swap(self, mine: "Tensor") -> "Tensor":
        """The other half's tensor of the same shape and type, for which it gets `mine`."""


Encoding = Mapping[str, "Tensor"]  # B encoded texts: by the names of the pipeline's arguments, B rows each


@dataclass(frozen=True, eq=False)
class Conditions:
    """Encoded prompts, B of them. negative is None where nothing is to be guided away from.

    image: the picture that all of them start from, as PIL has it; None without one.

    prompt_cut, negative_cut: tokens beyond max_sequence_length, which the model never sees.
    """

    prompt: Encoding
    negative: Encoding | None
    prompt_cut: int = 0
    negative_cut: int = 0
    image: Any = None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A denoising of B videos at the end of a step: all that is needed to go on from there.

    step: steps that are done; latents: [B, C, f, h, w], float32; state: what the scheduler remembers by name, as plain
    values, tensors (one that is as large as the latents has a row a video), and lists of these.
    """

    step: int
    latents: "Tensor"
    state: dict[str, Any]


OnStep = Callable[[int, Callable[[], Snapshot]], None]


class Adapter(ABC):
    """One loaded model. Its calls may be made in any order and again after any of them raised.

    One thread may decode while another encodes and denoises; no call is made by two threads at a time.
    """

    shape: "ModelShape"
    layers: "Layers | None"

    @abstractmethod
    def bring_layers(self, shelf: "Shelf") -> None:
        """Has a model that was loaded with `apart` compute with layers that all ranks have put on `shelf`."""

    @property
    @abstractmethod
    def by_rows(self) -> bool:
        """Whether `decode` inside a `rows.ByRows` makes the same rows of the frames of some rows of the latents."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        folder: "ModelFolder",
        dtype: str = "float32",
        device: "device | None" = None,
        compiled: bool = False,
        graph: bool = False,
        apart: bool = False,
        encoders_apart: bool = False,
    ) -> Self:
        """Loads all parts of a checked folder.

        dtype: name of the torch type to compute in; device: to compute on, the CPU where left out. On a GPU, compiled:
        blocks by torch.compile; graph: passes replayed as CUDA graphs. apart: the transformers'
        layers stay where they were loaded until `bring_layers`; encoders_apart: text encoders stay there for good, and
        each of their layers is brought to the device while it computes.
        """

    @abstractmethod
    def encode(
        self, prompt: str, negative_prompt: str, guided: bool, max_sequence_length: int, image: str = ""
    ) -> Conditions:
        """Encodes a prompt, the empty one included, and the negative prompt if `guided`; image: a picture's path."""

    @abstractmethod
    def guided(self, guidance_scale: float) -> bool:
        """Whether this guidance scale makes `denoise` ask for an encoded negative prompt."""

    @abstractmethod
    def noise(self, seed: int, num_frames: int, height: int, width: int) -> "Tensor":
        """The latents of one video to start from, [1, C, f, h, w], float32: for a seed the same on every rank."""

    @abstractmethod
    def denoise(
        self,
        conditions: Conditions,
        noise: "Tensor",
        steps: int,
        guidance_scale: float,
        sequence: Sequence,
        on_step: OnStep,
        halves: Halves | None = None,
        start: Snapshot | None = None,
        seeds: tuple[int, ...] = (),
        scheduler: str = "",
    ) -> "Tensor":
        """Denoises as many videos together as there are conditions and noises.

        Returns the latents, as large as `noise`, on every rank of the group. With `halves`, each half computes the
        prediction that is its own where there is guidance; where there is none, both compute the same.
        on_step(i, snapshot) is called at the end of step i = 0, 1, ...; what it raises ends the loop and goes through.
        Only inside it may `snapshot()` be called; the same values as its latents, and as its `start`, go on from there.
        seeds: those that the noises were drawn from; some models draw more. scheduler: its class, one of the shape's
        `schedulers`; "" for the checkpoint's own.
        Raises ValueError if guidance wants a negative prompt and `conditions` has none.
        """

    @abstractmethod
    def decode(self, latents: "Tensor") -> "np.ndarray":
        """Turns one video's latents into frames: uint8 [F, H, W, 3]. Raises VideoError if a pixel is not a number."""

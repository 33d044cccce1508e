"""What is to be rendered, as numbers: what one rank computes beside attention, and what it holds in memory."""

from dataclasses import dataclass
from math import ceil

from .costs import Costs

# Times a layer reads or writes an activation as large as its input, beside the matrix products (norms, modulation,
# rotary embedding, residuals). Fitted: Wan 2.1 14B takes 4.84 s a guided step on one H100, of which 4.6 s are products.
PASSES = 24
# As large as a layer's input, alive at the same time, beside what is between the two feed-forward products. Fitted to
# peaks of torch's memory on a GPU, Wan 2.1 14B and 1.3B at 480p.
ACTIVATIONS = 6
SETS = 2  # buffer sets that alternate by layer


@dataclass(frozen=True)
class Workload:
    """`videos` videos of one size by one model.

    tokens: of one video; batch: videos that are computed together; text_tokens: that each layer attends beside;
    latents: elements of one noise prediction; out_channels: of a token after the last layer; itemsize: bytes of an
    element. weights: elements of all that is loaded beside it, 0 for the layers' alone; float_weights: in float32.
    layer_weights, largest_layer: elements of all layers and of the largest, 0: as the other numbers have it. shelves:
    ranks that hold the layers together, each some; 0: they are in memory that is not the ranks' own. encoder_weights:
    elements of the text encoders, among `weights`; encoders_apart: they come from the host each time they are needed.
    """

    tokens: int
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    steps: int = 1
    videos: int = 1
    guided: bool = False
    itemsize: int = 4
    text_tokens: int = 512
    latents: int = 0
    out_channels: int = 64
    batch: int = 1
    weights: int = 0
    float_weights: int = 0
    layer_weights: int = 0
    largest_layer: int = 0
    shelves: int = 1
    encoder_weights: int = 0
    encoders_apart: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def weights_bytes(self) -> int:
        """Which a rank holds while it denoises; of a transformer's layers at least two attentions, two products each.

        Of layers that are not its own, the one that computes and the one that comes.
        """
        each = 8 * self.width**2 + 2 * self.width * self.ffn_dim
        held = max(self.weights - self.encoder_weights * self.encoders_apart, self.layers * each)
        if self.shelves != 1:
            whole, largest = self.layer_weights or self.layers * each, self.largest_layer or each
            own = whole // self.shelves + largest if self.shelves else 0
            held = min(held, held - whole + own + 2 * largest)
        return held * self.itemsize + 4 * self.float_weights

    def rest_s(self, ranks: int, costs: Costs) -> float:
        """Seconds of a layer beside self-attention, on the busiest of `ranks` ranks that share a video."""
        tokens, text, width = ceil(self.tokens / ranks), self.text_tokens, self.width
        flops = self.batch * (tokens * (12 * width**2 + 4 * width * self.ffn_dim) + text * 4 * width**2)
        cross = costs.attend(tokens, text, self.heads, self.batch, self.head_dim)
        return flops / costs.matmul_flops + cross + costs.copy(self.batch * PASSES * tokens * width * self.itemsize)

    def gather_bytes(self) -> int:
        """What each rank has in the end of each pass: the output of all tokens."""
        return self.batch * self.tokens * self.out_channels * self.itemsize

    def exchange_bytes(self) -> int:
        """What a rank of each guidance half sends to its twin in the other, once a step; in float32."""
        return self.batch * self.latents * 4

    def symmetric_bytes(self) -> int:
        """Symmetric memory of a rank, whatever the layout: in a ring a rank has all keys and values in the end."""
        whole = self.batch * self.tokens * self.width
        return SETS * (4 * whole * self.itemsize + self.gather_bytes())

    def memory_bytes(self, ulysses: int, ring: int, stored: bool) -> int:
        """What the busiest rank holds while it denoises: weights, activations, and symmetric memory, see below."""
        exchanged = self.exchanged_bytes(ulysses, ring, stored)
        return self.weights_bytes + self.activation_bytes(ulysses * ring) + exchanged

    def activation_bytes(self, ranks: int) -> int:
        """Of the busiest of `ranks` ranks that share a video, beside what others read or write."""
        inner = 1 if self.itemsize < 4 else 2  # GELU is part of the product in halves
        elements = ceil(self.tokens / ranks) * (ACTIVATIONS * self.width + inner * self.ffn_dim)
        return self.batch * elements * self.itemsize + self.gather_bytes()

    def exchanged_bytes(self, ulysses: int, ring: int, stored: bool) -> int:
        """Symmetric memory that a layout takes of the busiest rank.

        stored: whether keys and values of other ranks are copied into this rank's memory; else they are read in place.
        """
        tokens, width = ceil(self.tokens / (ulysses * ring)), self.width
        slot = ceil(self.heads / ulysses) * self.head_dim
        others = tokens * (ulysses - 1) * slot  # their q; their o on its way home; and what of the own they make
        keys = 2 * tokens * (ulysses * ring - 1) * slot if stored else 0
        elements = SETS * (3 * tokens * width + 3 * others + keys)
        return self.batch * elements * self.itemsize + 2 * self.exchange_bytes()

"""Drawing attention problems and computing them without any of our code, for the tests of executor and transports."""

import random
import time
from dataclasses import dataclass

import torch

from hpcdit.attention.executor import Attention, Gather
from hpcdit.attention.methods import schedule
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.kernels import cpu
from hpcdit.kernels.base import Kernels
from hpcdit.mesh import cut
from hpcdit.spans import Spans
from hpcdit.transport.base import Transport

UNTIMED = Spans(None, lambda: 0.0)


def unprojected(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An x and a linear layer's weight and bias that make v, [B, tokens, H, D], of it; each row has its effect."""
    whole, width = v.flatten(2), v.shape[2] * v.shape[3]
    bias = torch.linspace(-1, 1, width, dtype=torch.float64, device=v.device).to(v.dtype)
    turn = width // 2
    return (whole - bias).roll(-turn, 2), torch.eye(width, dtype=v.dtype, device=v.device).roll(turn, 0), bias


@dataclass(frozen=True)
class Case:
    """A method on ulysses x ring ranks, and the layer's shape."""

    method: str
    ulysses: int
    ring: int
    shape: Shape
    layers: int = 3
    seed: int = 0
    pause_s: float = 0.0  # at most, before each layer, another for each rank
    pieces: int = 0
    groups: int = 1

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def tensors(self, layer: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """q, k, v of a layer: [3, B, L, H, D], the same on every rank."""
        generator = torch.Generator().manual_seed(1000 * self.seed + layer)
        s = self.shape
        return torch.randn(3, s.batch, s.length, s.heads, s.dim, generator=generator, dtype=torch.float64).to(dtype)

    def reference(self, layer: int) -> torch.Tensor:
        """torch's own attention in float64: [B, L, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in self.tensors(layer))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    @property
    def channels(self) -> int:
        return self.shape.heads * self.shape.dim

    def session(self, transport: Transport) -> SequenceParallel:
        made = schedule(self.method, self.ulysses, self.ring, self.pieces, self.groups)
        return SequenceParallel(made, self.shape, transport, cpu, torch.float64, UNTIMED, self.channels)

    def layer(self, session: SequenceParallel, layer: int) -> float:
        """The largest error of this rank's attention in one layer."""
        tokens = slice(session.tokens.start, session.tokens.stop)
        own = dict(zip("qkv", self.tensors(layer)[:, :, tokens], strict=True))
        for name in session.tensors:
            session.publish(name, own[name])
        error = session.attend() - self.reference(layer)[:, tokens]
        return float(error.abs().max()) if error.numel() else 0.0

    def run(
        self, transport: Transport, dtype: torch.dtype = torch.float64, kernels: Kernels = cpu
    ) -> tuple[float, float]:
        """A chain of layers on this rank; the largest errors of attention and of gathered tokens."""
        attention = Attention(
            schedule(self.method, self.ulysses, self.ring, self.pieces, self.groups),
            self.shape,
            transport,
            kernels,
            dtype,
            UNTIMED,
        )
        width = self.shape.heads * self.shape.dim
        gather = Gather(self.shape.batch, self.shape.length, width, transport, kernels, dtype, UNTIMED)
        tokens = cut(self.shape.length, self.ranks)[transport.rank]
        worst = [0.0, 0.0]
        pauses = random.Random(100 * self.seed + transport.rank)
        for layer in range(self.layers):
            time.sleep(pauses.random() * self.pause_s)
            q, k, v = self.tensors(layer, dtype)[:, :, tokens.start : tokens.stop]
            own = {"q": q, "k": k, "v": v}
            for name in attention.tensors:
                if name == "v" and layer % 2:
                    attention.project(name, *unprojected(v))
                else:
                    attention.publish(name, own[name])
            out = attention.attend()
            reference = self.reference(layer)
            errors = [out.double() - reference[:, tokens.start : tokens.stop]]
            if layer == self.layers - 1:  # not after each: ranks that gather wait for each other, and hide a race
                whole = gather(out.flatten(2)).unflatten(2, (self.shape.heads, self.shape.dim))
                errors.append(whole.double() - reference)
            for i, error in enumerate(errors):
                worst[i] = max(worst[i], float(error.abs().max()) if error.numel() else 0.0)
                assert not error.isnan().any(), "not a number"
        attention.close()
        gather.close()
        return worst[0], worst[1]

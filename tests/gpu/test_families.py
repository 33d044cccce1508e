"""Passes of families that attend text and video together, compiled, and as CUDA graphs where texts are padded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Shape
from hpcdit.attention.session import SequenceParallel
from hpcdit.models.families import families
from hpcdit.models.loading import ModelFolder, inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.spans import Spans
from hpcdit.transport.local import LocalTransport
from tests.families import EXAMPLES, PROMPTS, Example
from tests.gpu.test_render import one_gpu

STEPS = 3  # the first pass of a kind runs as it is, the second is captured, the third replayed


def denoised(folder: ModelFolder, example: Example, graph: bool, compiled: bool = False) -> list[Tensor]:
    """The latents of each prompt, one after the other by the same graphs, if any."""
    from hpcdit.kernels import cuda

    device = torch.device("cuda", 0)
    adapter = PipelineAdapter.load(folder, "bfloat16", device, compiled=compiled, graph=graph)
    of = adapter.shape
    shape = Shape(1, of.length(*example.size, example.length), of.heads, of.head_dim)
    schedule, spans = Layout("ulysses", 1, 1).schedule(), Spans(None, lambda: 0.0)
    sequence = SequenceParallel(schedule, shape, LocalTransport(device), cuda, torch.bfloat16, spans, of.token_channels)
    found, guided = [], adapter.guided(example.scale)
    for prompt, negative, seed in PROMPTS:
        conditions = adapter.encode(prompt, negative, guided, example.length)
        noise = adapter.noise(seed, *example.size).to(device)
        settings = STEPS, example.scale, sequence, lambda step, snapshot: None
        found.append(adapter.denoise(conditions, noise, *settings, seeds=(seed,)).float())
    sequence.close()
    return found


@one_gpu
@pytest.mark.parametrize("name", ["mochi", "hunyuanvideo", "qwenimage"])
def test_a_graph_serves_texts_of_any_length(tmp_path: Path, name: str) -> None:
    from hpcdit.kernels import cuda

    example = EXAMPLES[name]
    example.make(tmp_path / name)
    folder = inspect(tmp_path / name)
    family = families()[folder.family]
    assert family.masked and family.graphs(True) and not family.graphs(False)
    if cuda.attend_first(torch.bfloat16, 64) is None:
        pytest.skip("no attention here that reads on the device how many keys count")
    replayed, plain = (denoised(folder, example, graph) for graph in (True, False))
    for ours, wanted in zip(replayed, plain, strict=True):
        assert ours.isfinite().all() and (ours - wanted).norm() < 0.01 * wanted.norm()
    assert (plain[0] - plain[1]).norm() > 0.05 * plain[0].norm()


@one_gpu
@pytest.mark.parametrize("name", ["cogvideox-5b", "flux", "ltx", "qwenimage"])
def test_compiled_layers_make_the_latents_of_those_that_are_not(tmp_path: Path, name: str) -> None:
    example = EXAMPLES[name]
    example.make(tmp_path / name)
    folder = inspect(tmp_path / name)
    made, plain = (denoised(folder, example, graph=compiled, compiled=compiled) for compiled in (True, False))
    for ours, wanted in zip(made, plain, strict=True):
        assert ours.isfinite().all() and (ours - wanted).norm() < 0.03 * wanted.norm()
    assert (plain[0] - plain[1]).norm() > 0.1 * plain[0].norm()

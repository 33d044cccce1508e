"""Text encoders that stay on the host: they encode the same, with one layer at a time on the device."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hpcdit.models.encoders import leave_on_host
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from tests.families import EXAMPLES


def visiting(model: nn.Module, host: set[int]) -> int:
    """Bytes of weights that lie elsewhere than where they were loaded."""
    return sum(p.nbytes for p in model.parameters() if p.data_ptr() not in host)


@pytest.mark.parametrize("name", ["wan-fine", "flux", "hunyuanvideo", "qwenimage"])
def test_encodings_are_the_same_and_one_layer_is_away_at_a_time(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    example.make(tmp_path / "model")
    folder = inspect(tmp_path / "model")
    usual, lean = (PipelineAdapter.load(folder, encoders_apart=apart) for apart in (False, True))
    encoders = [part for key, part in lean._pipe.components.items() if key.startswith("text_encoder")]
    assert encoders
    seen = list[tuple[int, int]]()  # bytes that are away, and of the largest layer
    hosts = [{p.data_ptr() for p in encoder.parameters()} for encoder in encoders]
    for encoder, host in zip(encoders, hosts, strict=True):
        largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in encoder.modules())
        for module in encoder.modules():
            module.register_forward_pre_hook(
                lambda *_, of=encoder, host=host, largest=largest: seen.append((visiting(of, host), largest))
            )
    asked = "the sea", "grey", True, example.length
    expected, found = usual.encode(*asked), lean.encode(*asked)
    for one, other in ((expected.prompt, found.prompt), (expected.negative, found.negative)):
        assert one is not None and other is not None and one.keys() == other.keys()
        assert all(torch.equal(x, other[key]) for key, x in one.items())
    assert all(away <= most for away, most in seen) and any(away for away, _ in seen)
    assert [visiting(encoder, host) for encoder, host in zip(encoders, hosts, strict=True)] == [0] * len(encoders)


def test_after_an_error_nothing_is_away() -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    model = nn.Sequential(nn.Linear(3, 3), Fails(3, 3))
    before = list(model.parameters())
    leave_on_host(model, torch.device("cpu"))
    with pytest.raises(ArithmeticError):
        model(torch.zeros(1, 3))
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))

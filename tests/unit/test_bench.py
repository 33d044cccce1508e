"""The benchmark's own parts: kernels that sleep but show wrong transfers, and what its tables conclude."""

import time

import pytest
import torch

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import schedule
from hpcdit.attention.schedule import Shape
from hpcdit.mesh import cut
from tests.attention_cases import UNTIMED
from tests.local import LocalTransport, on_ranks
from tools.bench.loading import peak, together
from tools.bench.paced import PacedKernels, expected
from tools.bench.paper import cogvideox, flux
from tools.bench.tables import Cell, gain, order, summary, table

SHAPE = Shape(2, 37, 5, 4)


def tensors() -> torch.Tensor:
    return torch.randn(3, 2, 37, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", ["usp", "torus"])
def test_paced_layers_give_q_plus_the_mean_of_k_and_v_whoever_computes_them(method: str) -> None:
    q, k, v = tensors()
    parts = cut(SHAPE.length, 4)

    def body(transport: LocalTransport) -> torch.Tensor:
        layout = schedule(method, 2, 2)
        attention = Attention(layout, SHAPE, transport, PacedKernels(), torch.float64, UNTIMED)
        mine = slice(parts[transport.rank].start, parts[transport.rank].stop)
        for name, x in (("v", v), ("k", k), ("q", q)):
            attention.publish(name, x[:, mine])
        return attention.attend()

    out = torch.cat(on_ranks((0, 0, 1, 1), body), dim=1)
    torch.testing.assert_close(out, expected(q, k, v))


def test_a_paced_call_shows_a_key_that_is_another_tokens() -> None:
    q, k, v = tensors()
    wrong = k.clone()
    wrong[:, 3] = k[:, 4]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(expected(q, wrong, v), expected(q, k, v))


def test_paced_calls_take_the_time_of_their_operations_and_none_where_there_is_nothing() -> None:
    q, k, v = (x.transpose(0, 1) for x in tensors())
    kernels = PacedKernels(4 * q.numel() * len(k) / 0.02)
    start = time.perf_counter()
    kernels.attend(q, k, v)
    assert time.perf_counter() - start >= 0.02
    out, lse = kernels.attend(q, k[:0], v[:0])
    assert not out.any() and bool(lse.isneginf().all())


def cells() -> list[Cell]:
    """x = 2: compute 1 s, USP's transfer 2 s."""
    return [
        Cell(2.0, "usp 2 x 4", 1.0, 2.0, [3.0, 2.4, 2.2], 2.5),
        Cell(2.0, "usp 2 x 4, 4 groups", 1.0, 2.0, [2.1], 2.6),
        Cell(2.0, "tas 4 x 2", 1.0, 1.0, [1.8], 1.7),
        Cell(2.0, "torus 4 x 2", 1.0, 1.0, [1.2], 1.1),
        Cell(2.0, "auto", 1.0, 1.0, [1.2], 1.1, "= torus 4 x 2"),
    ]


def test_gains_are_over_the_best_other_and_over_usp_in_whole_blocks() -> None:
    found = gain(cells(), "usp 2 x 4")
    assert found is not None
    assert (found.ours.method, found.best_other.method) == ("auto", "tas 4 x 2")
    assert found.over_best == pytest.approx(1.5) and found.over_usp == pytest.approx(2.0)
    assert found.over_peers == found.over_best
    own = gain([*cells(), Cell(2.0, "tas 4 x 2, 3 groups", 1.0, 1.0, [1.5], 1.4)], "usp 2 x 4")
    assert own is not None and own.over_best == pytest.approx(1.25) and own.over_peers == pytest.approx(1.5)
    assert gain(cells()[:3], "usp 2 x 4") is None  # nothing of ours
    text = summary([found], [cells()])
    assert "USP whole / ours, 0.6 <= x <= 2.5: mean 2.00, best 2.00" in text
    assert "best other / ours, 0.6 <= x <= 2.5: mean 1.50, best 1.50" in text
    assert "quickest Torus / its bound at worst: 1.20" in text
    assert "3 of 4 cells within 10%" in text  # usp 4 groups is 24 % off


def test_the_simulators_order_counts_where_layouts_differ_clearly() -> None:
    # Of six pairs usp and usp in groups are 14 % apart and predicted the other way round.
    assert order([cells()]) == (5, 6)


def test_a_table_has_a_line_a_cell_in_milliseconds() -> None:
    head, *lines = table(cells()).splitlines()
    assert len(lines) == 5 and "predicted" in head
    assert lines[0].split()[-7:] == ["2000.0", "2400.0", "2200.0", "3000.0", "2500.0", "+4.2%", "1.20"]
    assert lines[-1].endswith("= torus 4 x 2")


def test_the_papers_workloads_have_the_tokens_of_their_models() -> None:
    assert [flux(3072), flux(4096)] == [192 * 192 + 512, 256 * 256 + 512]
    # 161 and 321 frames, of which the first and then every four make one.
    assert [cogvideox(20), cogvideox(40)] == [41 * 1350 + 226, 81 * 1350 + 226]


def test_the_peak_of_several_processes_is_of_the_same_moment() -> None:
    one = [(0.0, 10, 0, 0), (2.0, 70, 0, 0), (4.0, 10, 0, 0)]
    other = [(0.0, 20, 0, 0), (1.0, 90, 0, 0), (1.5, 5, 0, 0), (3.0, 25, 0, 0)]
    assert peak([one, other]) == 100  # 10 and 90; never 70 and 90
    assert peak([[(0.0, 1, 30, 100)], [(0.0, 2, 30, 0)]]) == 103  # of a file of 100 two have mapped some
    assert together([(1, 60, 100), (2, 60, 0)]) == 123

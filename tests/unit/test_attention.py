"""Every method computes attention: on any mesh, with any lengths and head counts."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcdit.attention.executor import Attention
from hpcdit.attention.methods import METHODS, inter_elements, schedule
from hpcdit.attention.schedule import Shape, traffic
from hpcdit.kernels import cpu
from hpcdit.transport.base import Exchange
from tests.attention_cases import UNTIMED, Case
from tests.local import LocalTransport, on_ranks

CASES = Counter[str]()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, tuple[int, ...], bool]:
    """A method, a mesh of up to 8 ranks, nodes of the same or of uneven size, and a shape that fits nothing."""
    method = draw(st.sampled_from(sorted(METHODS)))
    ranks = draw(st.integers(1, 8))
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    ulysses = {"ulysses": ranks, "ring": 1}.get(method) or draw(st.sampled_from(divisors))
    per_node = draw(st.integers(1, ranks))
    shape = Shape(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 67)),
        draw(st.integers(ulysses, ulysses + 5)),
        draw(st.integers(1, 9)),
    )
    nodes = tuple(rank // per_node for rank in range(ranks))
    pieces, groups = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 99))
    return (
        Case(method, ulysses, ranks // ulysses, shape, seed=seed, pieces=pieces, groups=groups),
        nodes,
        draw(st.booleans()),
    )


@settings(max_examples=220, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_every_method_equals_torch_attention_in_float64(problem: tuple[Case, tuple[int, ...], bool]) -> None:
    case, nodes, apart = problem
    CASES[case.method] += 1
    for attention_error, gather_error in on_ranks(nodes, case.run, apart):
        assert attention_error < 1e-12
        assert gather_error < 1e-12


def test_the_drawn_cases_cover_every_method() -> None:
    if not CASES:
        pytest.skip("counts the cases of the test above, which did not run")
    assert set(CASES) == set(METHODS) and CASES.total() >= 200


class Hurried:
    """Kernels by which rank 0 has published layer 1 before rank 1 reads rank 0's k and v of layer 0."""

    LEAST_PART = cpu.LEAST_PART
    merge, embed, to_uint8 = staticmethod(cpu.merge), staticmethod(cpu.embed), staticmethod(cpu.to_uint8)
    attend_first = staticmethod(cpu.attend_first)

    def __init__(self, rank: int, published: Event) -> None:
        self.rank, self.calls, self.published = rank, 0, published

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1  # two a layer: own k and v, then the neighbour's, which are read in its memory
        if self.rank == 0 and self.calls == 3:
            self.published.set()
        if self.rank == 1 and self.calls == 2:
            assert self.published.wait(5)
        return cpu.attend(q, k, v)


@pytest.mark.parametrize("sets", [1, 2])
def test_two_buffer_sets_are_enough_and_needed(sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a barrier a rank may be a layer ahead of one that still reads its memory."""
    monkeypatch.setattr(Exchange, "SETS", sets)
    case, published = Case("ring", 1, 2, Shape(1, 24, 4, 4), layers=4), Event()
    worst = max(e for e, _ in on_ranks((0, 0), lambda t: case.run(t, kernels=Hurried(t.rank, published))))
    assert worst < 1e-12 if sets == 2 else worst > 0.01


def test_two_buffer_sets_are_enough_whoever_is_late() -> None:
    for seed in range(6):
        case = Case("torus", 2, 2, Shape(1, 24, 4, 4), layers=10, seed=seed, pause_s=0.01)
        assert max(error for error, _ in on_ranks((0, 0, 1, 1), case.run)) < 1e-12


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("method", ["tas", "torus"])
def test_lower_precisions_stay_within_their_rounding(method: str, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(method, 2, 2, Shape(1, 61, 5, 16))
    assert max(error for error, _ in on_ranks((0, 0, 1, 1), lambda t: case.run(t, dtype))) < tolerance


@pytest.mark.parametrize("nodes, per_node", [(2, 1), (2, 2), (3, 2), (4, 2), (3, 3)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_bytes_that_cross_nodes_equal_the_formula(method: str, groups: int, nodes: int, per_node: int) -> None:
    ranks = nodes * per_node
    degrees = {"ulysses": (ranks, 1), "ring": (1, ranks), "usp": (per_node, nodes)}.get(method, (nodes, per_node))
    shape, layers = Shape(1, 2 * ranks, 2 * ranks, 4), 2
    case, node_of = (
        Case(method, *degrees, shape, layers, groups=groups),
        tuple(rank // per_node for rank in range(ranks)),
    )
    counted = traffic(schedule(method, *degrees, groups=groups), shape, node_of)

    def bytes_sent(transport: LocalTransport) -> int:
        case.run(transport)
        return transport.traffic.inter

    gathered = (nodes - 1) * per_node * shape.length * shape.heads * shape.dim  # of the last layer's output
    sent = sum(on_ranks(node_of, bytes_sent)) // 8 - gathered
    assert sent == layers * counted["inter"]
    if (formula := inter_elements(method, shape, nodes)) is not None:
        assert counted["inter"] == formula


class Broken(Exception):
    pass


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.data())
def test_a_rank_that_fails_anywhere_drains_its_round_and_the_next_one_is_exact(
    problem: tuple[Case, tuple[int, ...], bool], data: st.DataObject
) -> None:
    case, nodes, apart = problem
    broken = data.draw(st.sets(st.integers(0, case.ranks - 1), min_size=1), "the ranks that fail")
    calls = {rank: data.draw(st.integers(0, 30), f"calls of rank {rank} that succeed") for rank in sorted(broken)}

    def body(transport: LocalTransport) -> float:
        session = case.session(transport)
        left = [calls.get(transport.rank, 1 << 30)]

        def fragile(call: Callable[..., None]) -> Callable[..., None]:
            def wrapped(*args: Any) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise Broken
                call(*args)

            return wrapped

        replay = session._attention.replay
        for owner, name in ((session._attention, "_attend"), (session._attention, "_write"), (replay, "pull")):
            setattr(owner, name, fragile(getattr(owner, name)))
        session.publish = fragile(session.publish)
        for first in range(0, case.layers, 2):  # passes of two rounds
            try:
                error = max(case.layer(session, layer) for layer in (first, first + 1))
                session.gather(torch.zeros(case.shape.batch, len(session.tokens), case.channels, dtype=torch.float64))
            except Broken:
                session.drain(2)
                left[0] = 1 << 30
        assert session.passes == case.layers // 2
        session.close()
        return error

    # Of an even number of passes, the last is whole on all ranks: those before may hold junk.
    case = replace(case, layers=8)
    assert max(on_ranks(nodes, body, apart)) < 1e-12


class Uncopied:
    """The CPU's kernels, but what is to be copied is written down: how many blocks a call, and with what done to it."""

    def __init__(self) -> None:
        self.copied: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(cpu, name)

    def embed(self, x: torch.Tensor, norm: Any, tables: Any, blocks: Any) -> None:
        self.copied.append(len(blocks))
        cpu.embed(x, norm, tables, blocks)


@pytest.mark.parametrize(
    ("method", "ulysses", "ring", "copied"),
    [("torus", 1, 1, {"q": 0, "k": 0, "v": 0}), ("ring", 1, 3, {"q": 0, "k": 1, "v": 1}), ("ulysses", 3, 1, 3)],
)
def test_what_only_its_own_rank_reads_is_not_copied(method: str, ulysses: int, ring: int, copied: Any) -> None:
    """A ring sends keys and values alone; Ulysses puts every rank's queries side by side, its own too."""
    shape, x = Shape(2, 12, 3, 4), torch.randn(2, 12 // (ulysses * ring), 3, 4)

    def body(transport: Any) -> Any:
        kernels: Any = Uncopied()
        attention = Attention(schedule(method, ulysses, ring), shape, transport, kernels, torch.float32, UNTIMED)
        for _ in range(2):
            for name in attention.tensors:
                attention.publish(name, x)
            attention.attend()
        attention.publish("q", x, None, (torch.ones(len(x[0]), 1, 2), torch.zeros(len(x[0]), 1, 2)))
        return attention.tensors, kernels.copied

    for tensors, counts in on_ranks((0,) * (ulysses * ring), body, False):
        wanted = [copied if isinstance(copied, int) else copied[name] for name in tensors] * 2
        assert counts == [*wanted, ulysses], "a rotation is written where it is to be read"

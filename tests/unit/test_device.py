"""Who has a device to itself."""

import pytest
import torch

from hpcdit.attention.schedule import Shape
from hpcdit.device import _enough
from hpcdit.transport.local import LocalTransport
from tests.attention_cases import Case


@pytest.mark.parametrize(
    ("found", "hosts", "enough"),
    [
        ([(2, "a"), (2, "a")], [0, 0], [True, True]),
        ([(1, "a"), (1, "a")], [0, 0], [False, False]),  # one GPU, two ranks
        ([(1, "a"), (1, "b")], [0, 0], [True, True]),  # each sees its own alone
        ([(1, "a"), (1, "a")], [0, 1], [True, True]),  # of two hosts, whatever they are called
        ([(0, ""), (1, "b")], [0, 1], [False, True]),
        ([(2, "a"), (2, "a"), (2, "a")], [0, 0, 1], [True, True, True]),
        ([(2, "a"), (2, "a"), (2, "a")], [0, 0, 0], [False, False, False]),
    ],
)
def test_a_rank_has_a_device_to_itself(found: list[tuple[int, str]], hosts: list[int], enough: list[bool]) -> None:
    assert [_enough(rank, found, hosts) for rank in range(len(hosts))] == enough


def test_one_rank_needs_no_other_memory_than_its_own() -> None:
    case = Case("torus", 1, 1, Shape(2, 37, 3, 8), groups=2)
    assert max(case.run(LocalTransport(torch.device("cpu")))) < 1e-12

"""What the program sets before anything is imported."""

import gc
from collections.abc import Iterator

import pytest

from hpcdit import app
from hpcdit.__main__ import work


@pytest.fixture
def collector() -> Iterator[None]:
    """On again afterwards."""
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize(
    "given, waits",
    [
        ({}, ("passive", "2000")),
        ({"GOMP_SPINCOUNT": "7"}, ("passive", "7")),
        ({"OMP_WAIT_POLICY": "active"}, ("active", None)),
        ({"OMP_WAIT_POLICY": "passive"}, ("passive", None)),
    ],
)
def test_threads_wait_as_the_environment_says_or_spin_for_a_moment_and_sleep(
    given: dict[str, str], waits: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    environment = {**given, "MPI_LOCALRANKID": "1"}  # the first rank of a host also looks for what others left
    monkeypatch.setattr("os.environ", environment)
    seen = list[tuple[str | None, ...]]()

    def main(tell_guard: object) -> int:
        seen.append(tuple(environment.get(name) for name in names))
        return 5

    monkeypatch.setattr(app, "main", main)
    assert work(lambda timeout_s: None) == 5
    assert seen == [waits]

"""The cost model, its units on the command line, and what is kept of a measurement."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hpcdit.config import conf_dir
from hpcdit.planner.costs import Costs, Link
from hpcdit.planner.measured import TILES, fit, kept_at, read, write
from hpcdit.planner.presets import UNITS, overridden, to_costs, to_keys

H100 = to_costs(dict(OmegaConf.load(conf_dir() / "cluster" / "4x8-h100.yaml").costs))


def test_large_attention_runs_at_full_speed_and_small_pieces_lose() -> None:
    """As measured on an H100 with heads of 128: three calls of Torus at 4k tokens, 12 heads, take 1.4x one call."""
    whole = H100.attend(32_768, 32_768, 24, 1, 128)
    assert whole == pytest.approx(4 * 32_768**2 * 24 * 128 / 690e12, rel=0.02)
    one = H100.attend(4096, 4096, 12, 1, 128)
    three = H100.attend(2048, 2048, 12, 1, 128) * 2 + H100.attend(2048, 4096, 12, 1, 128)
    assert 1.2 < three / one < 1.5
    assert H100.attend(0, 4096, 12, 1, 128) == H100.attend(4096, 0, 12, 1, 128) == 0


@given(*[st.integers(1, 5000)] * 3, st.integers(1, 40), st.integers(1, 4))
def test_a_call_in_two_parts_never_takes_less(a: int, b: int, keys: int, heads: int, batch: int) -> None:
    def time(q: int, k: int) -> float:
        return H100.attend(q, k, heads, batch, 128)

    assert time(keys, a) + time(keys, b) >= time(keys, a + b) * (1 - 1e-9)
    tile = H100.tile
    assert time(a * tile, keys) + time(b * tile, keys) >= time((a + b) * tile, keys) * (1 - 1e-9)


def test_the_keys_of_the_command_line_and_the_model_s_units_say_the_same() -> None:
    keys = to_keys(H100)
    assert set(keys) == set(UNITS)
    assert keys["inter_gb_s"] == pytest.approx(50) and keys["call_us"] == pytest.approx(10)
    assert (keys["lanes"], keys["memory_gb"]) == (132, 80)
    assert H100.inter.latency_s == pytest.approx(10e-6)
    assert (H100.inter.bytes_per_s, H100.intra.bytes_per_s) == (50e9, 450e9)
    assert (H100.attention_flops, H100.matmul_flops, H100.memory_bytes) == (690e12, 780e12, 80e9)
    assert to_keys(to_costs(keys)) == pytest.approx(keys)


def test_what_is_given_goes_before_what_is_measured() -> None:
    given = {**dict.fromkeys(UNITS), "inter_gb_s": 1.25, "lanes": 7}
    found = overridden(H100, given)
    assert (found.inter.bytes_per_s, found.lanes) == (1.25e9, 7)
    kept = {key: value for key, value in to_keys(H100).items() if key not in ("inter_gb_s", "lanes")}
    assert {key: to_keys(found)[key] for key in kept} == pytest.approx(kept)


@pytest.mark.parametrize("tile", TILES)
def test_speed_and_tile_are_found_again_in_timings(tile: int) -> None:
    times = {q: -(-q // tile) * min(tile, q) * 1000 / 5e9 for q in (16, 40, 72, 136, 264, 512)}
    rate, found = fit(times, 1000)
    assert rate == pytest.approx(5e9) and found == tile


def test_timings_that_only_scatter_have_no_tile() -> None:
    """A tile of 16 would explain these a little better than none does."""
    times = {q: q * 1000 / 5e9 * (-(-q // 16) * 16 / q) ** 0.52 for q in (16, 40, 72, 136, 264, 512)}
    assert fit(times, 1000)[1] == 1


def test_costs_are_kept_for_one_cluster_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = kept_at({"nodes": [0, 0, 1], "mpi": "MPICH"})
    assert path.parent == tmp_path / "hpcdit" and path != kept_at({"nodes": [0, 1, 1], "mpi": "MPICH"})
    assert read(path) is None
    write(path, H100.to_dict())
    assert Costs.from_dict(read(path) or {}) == H100
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept_at({}).parent == tmp_path / ".cache" / "hpcdit"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", json.dumps({**H100.to_dict(), "call_s": 0}), '{"inter": 1}', "\x00\xff"]
    + [json.dumps({**H100.to_dict(), key: bad}) for key, bad in (("more", 1), ("tile", None), ("tile", "a"))]
    + [json.dumps({**H100.to_dict(), "inter": {"latency_s": 1e-5, "bytes_per_s": float("nan")}})],
)
def test_a_damaged_cache_counts_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(content, "latin-1")
    assert read(path) is None
    write(path, H100.to_dict())
    assert read(path) == H100.to_dict()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "hpcdit").write_text("a file where the folder should be")
    path = tmp_path / "hpcdit" / "costs.json"
    write(path, H100.to_dict())
    assert read(path) is None


def test_a_link_of_no_latency_and_costs_survive_json() -> None:
    costs = Costs(1e10, 1e10, 1e-5, 1, 1, 1e9, 1e9, Link(1e-7, 1e9), Link(1e-7, 1e9))
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs

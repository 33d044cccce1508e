"""Runs the cases of this folder under mpirun, many in one start, and looks at what they found."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.mpi import cases, failing
from tests.mpi.starts import Case, Found, case, mpirun, together
from tests.system.program import prompts, statuses

WAITING = "tests.mpi.waiting"
Requests = tuple[Path, dict[str, np.ndarray]]


def model_and_prompts(request: pytest.FixtureRequest, folder: Path) -> list[str]:
    return [str(request.getfixturevalue("tiny")[0]), str(request.getfixturevalue("requests")[0]), str(folder)]


def failing_runs(runs: str) -> Case:
    return Case(4, "renders", lambda *given: [*model_and_prompts(*given), runs], "tests.mpi.failing")


def circles(videos: int) -> Callable[[pytest.FixtureRequest, Path], list[str]]:
    """The arguments of cases that are stopped."""

    def words(request: pytest.FixtureRequest, folder: Path) -> list[str]:
        file = prompts(folder / "p.txt", ["a red circle"] * videos)
        return [str(request.getfixturevalue("tiny")[0]), str(file), str(folder / "out")]

    return words


def one_prompt(request: pytest.FixtureRequest, folder: Path) -> list[str]:
    return [str(prompts(folder / "one.txt", ["a blue triangle moving right on black"])), str(folder)]


CASES = {
    "transports": Case(6, "transports"),
    "demo": Case(6, "program", one_prompt),
    "frames": Case(6, "wan_frames", lambda request, _: list(map(str, request.getfixturevalue("tiny")))),
    "groups": Case(4, "program_in_groups", model_and_prompts),
    "a failure": failing_runs("METHODS"),
    "no memory": failing_runs("MEMORY"),
    "a failure in rows": failing_runs("ROWS"),
    "too many failures": failing_runs("LIMIT"),
    "a stop, one group is idle": Case(4, "stop_in_a_group", circles(1)),
    "a stop, all groups are busy": Case(4, "stop_in_a_group", circles(50)),
    "a stop while it loads": Case(4, "stop_while_loading", circles(1)),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Found]:
    return {}


@pytest.fixture
def found(request: pytest.FixtureRequest, made: dict[str, Found]) -> Found:
    return together(request, CASES, made)


@case("transports")
def test_every_method_is_exact_on_one_to_six_ranks_over_both_ways_between_nodes(found: Found) -> None:
    assert sorted(found.result) == list("123456")
    for size, (worst, count) in found.result.items():
        assert worst < 1e-12, f"{size} ranks"
        assert count >= 15, f"{size} ranks"


def test_an_exception_in_a_thread_of_one_rank_ends_all_ranks_with_its_message() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 on .*ZeroDivisionError"):
        mpirun(3, "broken_thread", module=WAITING, timeout_s=60)


@pytest.mark.parametrize("ranks, parts", [(3, 1), (4, 2)])
def test_a_rank_without_heartbeat_is_named_by_the_one_that_waits(ranks: int, parts: int) -> None:
    said, seconds = mpirun(ranks, "silent_rank", str(parts), module=WAITING, timeout_s=60)
    assert said.startswith(f"no sign of life from rank {ranks - 1}") and "waiting for a piece" in said
    assert 1.5 < seconds < 10


@case("demo")
def test_the_demo_is_the_same_video_on_one_to_six_ranks(found: Found) -> None:
    """The whole program, with the packaged model and the settings that are shipped, but shorter."""
    assert found.result == {str(size): 0 for size in range(1, 7)}
    frames = {}
    for size in range(1, 7):
        (path,) = (found.folder / str(size) / "videos").glob("*.h5")
        with h5py.File(path) as file:
            frames[size] = file["frames"][:].astype(int)
    assert frames[1].shape == (17, 96, 96, 3) and frames[1].std() > 20
    for size in range(2, 7):
        assert abs(frames[size] - frames[1]).max() <= 1, f"{size} ranks"


def test_four_ranks_of_a_host_hold_one_copy_of_the_weights(tmp_path: Path) -> None:
    from tests.checkpoints import make_wan

    make_wan(tmp_path / "model", heads=6, head_dim=64, layers=12, ffn_dim=2000)  # 136 and 68 MB: more than noise
    how = "float32 resident", "bfloat16 resident", "bfloat16 sharded"
    found = mpirun(4, "weights", str(tmp_path / "model"), *how)
    for weights, _, left in found:
        assert weights > 6e7
        assert 0.9 * weights < left < 1.3 * weights
    weights, most, _ = found[-1]  # of mapped weights every rank counts its share at another moment
    assert most < 1.6 * weights, "layers that were cast lie where they were, too"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random checkpoint with 5 heads, and the frames that diffusers' own pipeline makes of it on one process."""
    import torch
    from diffusers import WanPipeline

    from tests.checkpoints import make_wan

    folder = tmp_path_factory.mktemp("wan")
    make_wan(folder / "model")
    pipe = WanPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    frames = {}
    for name, scale in (("guided", 4.0), ("unguided", 1.0)):
        video = pipe(
            cases.PROMPT,
            cases.NEGATIVE,
            num_frames=cases.SIZE[0],
            height=cases.SIZE[1],
            width=cases.SIZE[2],
            num_inference_steps=cases.STEPS,
            guidance_scale=scale,
            max_sequence_length=cases.LENGTH,
            generator=torch.Generator().manual_seed(cases.SEED),
            output_type="np",
        ).frames[0]
        frames[name] = (video * 255).round().astype(int)
    np.savez(folder / "frames.npz", **frames)
    return folder / "model", folder / "frames.npz"


@case("frames")
def test_frames_equal_diffusers_on_one_to_six_ranks_by_every_method(found: Found) -> None:
    assert sorted(found.result) == list("123456")
    for size, (count, worst) in found.result.items():
        assert worst <= 1, f"{size} ranks: {worst} levels"
        assert count >= 5, f"{size} ranks"


@dataclass(frozen=True)
class Request:
    """A line of the prompts file, with settings of the tiny checkpoint's own."""

    id: str
    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float = 4.0
    num_frames: int = 9
    height: int = 48
    width: int = 80
    steps: int = 2
    max_sequence_length: int = 24


REQUESTS = (
    Request("a", "a red circle moving left on the sea", "grey", 3),
    Request("b", "the cat on the sky", "a red circle", 8),
    Request("c", "a white square", "", 9),
    Request("unguided", "a red circle", "grey", 4, guidance_scale=1.0),
    Request("short", "a red circle", "grey", 5, num_frames=5),
    Request("d", "a cat moving left", "the sea", 6),
    Request("e", "grey sky", "red", 7),
)
# Which of them are denoised together, by `parallel.batch`.
BATCHES = {
    1: [{request.id} for request in REQUESTS],
    2: [{"a", "b"}, {"c"}, {"unguided"}, {"short"}, {"d", "e"}],
    3: [{"a", "b", "c"}, {"unguided"}, {"short"}, {"d", "e"}],
}


@pytest.fixture(scope="module")
def requests(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """The prompts file of REQUESTS, and the frames that diffusers' own pipeline makes of each by itself."""
    import torch
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(tiny[0])
    pipe.set_progress_bar_config(disable=True)
    frames = {}
    for request in REQUESTS:
        settings = asdict(request)
        own, steps = settings.pop("id"), settings.pop("steps")
        generator = torch.Generator().manual_seed(settings.pop("seed"))
        video = pipe(**settings, num_inference_steps=steps, generator=generator, output_type="np").frames[0]
        frames[own] = (video * 255).round().astype(int)
    file = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    file.write_text("".join(json.dumps(asdict(request)) + "\n" for request in REQUESTS))
    return file, frames


@case("groups")
def test_frames_equal_diffusers_with_replicas_halves_of_guidance_and_batches(found: Found, requests: Requests) -> None:
    codes = found.result
    assert len(codes) == len(list(chain(*cases.LAYOUTS))) and set(codes.values()) == {0}
    for layout in codes:
        for own, expected in requests[1].items():
            with h5py.File(found.folder / layout / "videos" / f"{own}.h5") as file:
                assert abs(file["frames"][:].astype(int) - expected).max() <= 1, f"{own} on {layout}"
                names, ranks = (set(file["trace/events"][column]) for column in ("name", "rank"))
                plan = json.loads(file.attrs["plan"])
            replicas, cfg, sequence, batch = map(int, re.findall(r"\d+", layout))
            assert [plan["replicas"], plan["cfg"], plan["sequence"]] == [replicas, cfg, sequence]
            assert (b"exchange cfg" in names) == (cfg == 2 and own != "unguided"), f"{own} on {layout}"
            assert plan["batch"] == len(next(part for part in BATCHES[batch] if own in part)), f"{own} on {layout}"
            assert len(ranks) == cfg * sequence, "one group has rendered it"
            nodes = {rank // batch for rank in ranks} if cfg == 1 else set()
            assert cfg == 2 or (plan["inter"] != "none") == (len(nodes) > 1), f"{own} on {layout}: {plan['inter']}"


def test_the_queue_hands_every_job_out_once_and_rank_0_hears_of_all() -> None:
    for took, heard in mpirun(4, "queue", module=WAITING, timeout_s=60):
        assert sorted(chain(*took)) == list(range(200))
        assert sorted(chain(*heard)) == list(range(200))
        assert took[0] and took[2], "no group is left out"


@case("a stop, one group is idle", "a stop, all groups are busy")
def test_a_stop_that_one_rank_hears_of_ends_all_groups(found: Found) -> None:
    assert found.result == [[75] * 4]
    log = (found.folder / "out" / "run.log").read_text()
    assert "stopped on request (SIGTERM)" in log
    assert log.count(": starts") == min((found.folder / "p.txt").read_text().count("\n"), 2) and ": done" not in log


@case("a stop while it loads")
def test_a_request_to_stop_one_rank_while_it_loads_stops_all_at_once(found: Found) -> None:
    assert found.result == [[75] * 2]
    assert "stopped on request (SIGTERM)" in (found.folder / "out" / "run.log").read_text()


def check(out: Path, requests: Requests, failed: set[str]) -> dict[str, tuple[str, str]]:
    """That all videos but those are there and right; returns what job.h5 says of each."""
    found = statuses(out)
    assert {own for own, (status, _) in found.items() if status == "failed"} == failed, found
    for own, expected in requests[1].items():
        path = out / "videos" / f"{own}.h5"
        assert path.exists() == (own not in failed)
        if path.exists():
            with h5py.File(path) as file:
                assert abs(file["frames"][:].astype(int) - expected).max() <= 1, own
    return found


@case("a failure")
def test_a_rank_that_fails_anywhere_costs_one_video(found: Found, requests: Requests) -> None:
    codes = found.result
    assert len(codes) == len(failing.METHODS)
    for run in failing.METHODS:
        assert codes[run.name()] == 3, run.name()
        reason = check(found.folder / run.name(), requests, {"a"})["a"][1]
        assert "ZeroDivisionError: a bug" in reason, reason
        assert f"rank {run.fault.rank}" in reason or run.fault.where == "decode"


@case("no memory")
def test_a_lack_of_memory_is_met_with_less_at_a_time(found: Found, requests: Requests) -> None:
    codes = found.result
    once, twice, batch, decode = (run.name() for run in failing.MEMORY)
    assert codes == {once: 0, twice: 3, batch: 0, decode: 0}
    for name in codes:
        jobs = check(found.folder / name, requests, {"a"} if name == twice else set())
        log = (found.folder / name / "run.log").read_text()
        assert ("once more, one by one" in log) == (name == batch)
        assert ("once more, by the smallest plan" in log) == (name in (once, twice))
    assert "rank 2" in jobs["a"][1] or jobs["a"] == ("done", "")


@case("a failure in rows")
def test_a_rank_that_fails_in_decoding_by_rows_costs_one_video_or_nothing(found: Found, requests: Requests) -> None:
    codes = found.result
    for run in failing.ROWS:
        fails = isinstance(run.fault.error, ZeroDivisionError)
        assert codes[run.name()] == (3 if fails else 0), run.name()
        reason = check(found.folder / run.name(), requests, {"a"} if fails else set())["a"][1]
        assert reason == (f"rank {run.fault.rank} while decoding: ZeroDivisionError: a bug" if fails else "")
        with h5py.File(found.folder / run.name() / "videos" / "b.h5") as file:
            events = file["trace/events"][:]
            assert json.loads(file.attrs["plan"])["vae"] == "rows"
        assert set(events["rank"][events["name"] == b"decode"]) == set(range(4))


@case("too many failures")
def test_so_many_failures_end_the_run_and_leave_the_rest_pending(found: Found, requests: Requests) -> None:
    (code,) = found.result.values()
    assert code == 3
    out = found.folder / failing.LIMIT[0].name()
    status = [status for status, _ in statuses(out).values()]
    assert status == ["failed"] * 2 + ["pending"] * 5
    assert "5 not begun (failures.max)" in (out / "run.log").read_text()

"""Checkpoints: whatever the scheduler, a denoising that goes on from one ends as if it had not been left."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcdit.config import Sampling
from hpcdit.models.base import Snapshot
from hpcdit.models.families.wan import FAMILY
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.render.batch import CHECKPOINTS
from hpcdit.render.checkpoints import Checkpoints, join, pack, unpack
from hpcdit.render.engine import stack
from hpcdit.render.manifest import Job
from tests.checkpoints import make_wan
from tests.families import EXAMPLES, picture
from tests.unit.test_wan import Group, Member
from tests.unit.test_wan import one_thread as one_thread

STEPS = 6
SIZE = (9, 32, 48)
SAMPLING = Sampling(*SIZE, steps=STEPS, guidance_scale=4.0, seed=3, fps=16, max_sequence_length=23)
# The scheduler draws noise in its steps, after noise for the picture; the pipeline does not tell when a step ends.
OTHERS = "cogvideox15-image", "hunyuanvideo15"
CHOSEN = "CogVideoXDPMScheduler"  # in the place of another
MODEL = {"fingerprint": "f" * 64, "dtype": "float32"}


def job(name: str, **changes: Any) -> Job:
    return Job(0, name, f"a {name}", "", replace(SAMPLING, **changes))


@dataclass(frozen=True)
class Subject:
    adapter: PipelineAdapter
    image: str
    scheduler: str = ""


def denoise(
    subject: Subject,
    jobs: list[Job],
    start: Snapshot | None = None,
    on_step: Callable[[int, Callable[[], Snapshot]], None] = lambda *_: None,
) -> torch.Tensor:
    adapter, seeds = subject.adapter, tuple(j.sampling.seed for j in jobs)
    both = stack([adapter.encode(j.prompt, j.negative_prompt, True, 23, subject.image) for j in jobs])
    noise = torch.cat([adapter.noise(seed, *SIZE) for seed in seeds])
    sequence = Member(Group(adapter.shape.length(*SIZE, 23)), 0)
    return adapter.denoise(both, noise, STEPS, 4.0, sequence, on_step, None, start, seeds, subject.scheduler)


@pytest.fixture(scope="module", params=[*FAMILY.components["scheduler"].classes, *OTHERS, CHOSEN])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("model") / "model"
    chosen = request.param if request.param == CHOSEN else ""
    example = EXAMPLES.get("cogvideox-2b" if chosen else request.param)
    if example:
        example.make(folder)
    else:
        make_wan(folder, scheduler=request.param)
    return Subject(
        PipelineAdapter.load(inspect(folder)), str(picture(folder)) if example and example.image else "", chosen
    )


def test_every_scheduler_goes_on_bit_by_bit_from_any_step(subject: Subject) -> None:
    jobs = [job("cat", seed=3), job("dog", seed=4)]
    kept: list[bytes] = []
    each: list[list[bytes]] = []

    def keep(step: int, snapshot: Callable[[], Snapshot]) -> None:
        taken = snapshot()
        assert taken.step == step + 1
        each.append([pack(taken, video, {}) for video in range(2)])

    whole = denoise(subject, jobs, on_step=keep)
    assert len(each) == STEPS and not kept
    denoise(subject, [job("bird", seed=9)])  # what the scheduler knows of another video does not matter
    for step, files in enumerate(each, 1):
        steps: list[int] = []
        start = join([unpack(data)[0] for data in files])
        again = denoise(subject, jobs, start, lambda step, _: steps.append(step))  # noqa: B023
        assert again.equal(whole), f"after step {step}"
        assert steps == list(range(step, STEPS))
    alone = denoise(subject, [jobs[1]], unpack(each[2][1])[0])
    assert torch.allclose(alone, whole[1:], atol=1e-4), "one of two videos may go on by itself"
    assert denoise(subject, jobs).equal(whole), "and nothing is left of it in the adapter"


def test_a_state_that_is_none_is_refused(subject: Subject) -> None:
    bad = Snapshot(1, subject.adapter.noise(3, *SIZE), {"step": 3})
    with pytest.raises(ValueError, match="does not remember step"):
        denoise(subject, [job("cat")], bad)
    denoise(subject, [job("cat")])


def snapshot(step: int = 2, value: float = 1.0) -> Snapshot:
    latents = torch.full((1, 2, 3, 4, 5), value)
    return Snapshot(step, latents, {"outputs": [None, latents + 1], "order": 2, "sigmas": torch.arange(7.0)})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, 0.0, MODEL)


def test_a_checkpoint_is_read_as_it_was_written_and_removed_when_its_video_is_done(checkpoints: Checkpoints) -> None:
    assert checkpoints.read(job("cat")) == b"" and not checkpoints.said
    checkpoints.write([job("cat")], snapshot)
    found, _ = unpack(checkpoints.read(job("cat")))
    assert found.step == 2 and found.latents.equal(snapshot().latents)
    assert found.state["outputs"][0] is None and found.state["outputs"][1].equal(snapshot().latents + 1)
    assert found.state["order"] == 2 and found.state["sigmas"].equal(torch.arange(7.0))
    checkpoints.remove("cat")
    checkpoints.close()
    assert not checkpoints.folder.exists() and not checkpoints.said


@pytest.mark.parametrize(
    "asked, words",
    [
        (job("cat", seed=4), "another sampling"),
        (replace(job("cat"), prompt="a dog"), "another prompt"),
        (job("cat", steps=1), "another sampling"),
    ],
)
def test_a_checkpoint_of_another_video_is_not_used(checkpoints: Checkpoints, asked: Job, words: str) -> None:
    checkpoints.write([job("cat")], snapshot)
    assert checkpoints.read(asked) == b""
    assert words in checkpoints.said.pop()


def test_a_checkpoint_of_another_model_is_not_used(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write([job("cat")], snapshot)
    checkpoints.wait()
    assert Checkpoints(tmp_path, 0.0, {**MODEL, "dtype": "bfloat16"}).read(job("cat")) == b""
    assert Checkpoints(tmp_path, None, MODEL).read(job("cat"))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_checkpoint_is_not_used_and_told_of(checkpoints: Checkpoints, keep: int) -> None:
    checkpoints.write([job("cat")], snapshot)
    checkpoints.wait()
    path = checkpoints.folder / "cat.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert checkpoints.read(job("cat")) == b""
    assert "cat.safetensors is not used" in checkpoints.said.pop()


def test_any_file_in_the_place_of_a_checkpoint_is_not_used(checkpoints: Checkpoints) -> None:
    checkpoints.folder.mkdir()
    for said in (
        {},
        {"format": "x"},
        {"format": "hpcdit-checkpoint/1"},
        {"format": "hpcdit-checkpoint/1", "step": "a"},
    ):
        header = json.dumps({"__metadata__": {k: json.dumps(v) for k, v in said.items()}}).encode()
        (checkpoints.folder / "cat.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert checkpoints.read(job("cat")) == b"" and checkpoints.said.pop()


def test_latents_that_are_not_numbers_replace_no_checkpoint(checkpoints: Checkpoints) -> None:
    checkpoints.write([job("cat")], snapshot)
    checkpoints.write([job("cat")], lambda: snapshot(5, float("nan")))
    assert unpack(checkpoints.read(job("cat")))[0].step == 2


def test_what_goes_wrong_is_told_and_ends_nothing(checkpoints: Checkpoints) -> None:
    def short() -> Snapshot:
        raise MemoryError("no room")

    checkpoints.write([job("cat")], short)
    assert "no room" in checkpoints.said.pop()
    checkpoints.folder.write_text("a file where a folder should be")
    checkpoints.write([job("cat")], snapshot)
    checkpoints.wait()
    assert "no checkpoint of cat" in checkpoints.said.pop()


def test_checkpoints_are_due_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def written(seconds: float | None, *steps: tuple[float, bool]) -> list[bool]:
        """Whether there is one after each step, of which each takes so long."""
        checkpoints, taken = Checkpoints(tmp_path, seconds, MODEL), list[bool]()
        checkpoints.begin()
        for passed, last in steps:
            now[0] += passed
            count = [0]

            def take() -> Snapshot:
                count.append(1)  # noqa: B023
                return snapshot()

            checkpoints.step([job("cat")], take, last)
            checkpoints.wait()
            taken.append(len(count) > 1)
        return taken

    assert written(600, (599, False), (1, False), (599, False), (2, False)) == [False, True, False, True]
    assert written(600, (59, False), (1, True)) == [False, True], "what took a minute is kept for the decoding"
    assert written(600, (30, True)) == [False]
    assert written(None, (9999, False), (9999, True)) == [False, False]
    assert written(0, (0, False), (0, True)) == [True, True]


def test_what_is_left_for_finished_videos_is_removed_at_the_start(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.write([job("cat")], snapshot)
    checkpoints.write([job("dog")], snapshot)
    checkpoints.wait()
    (tmp_path / CHECKPOINTS / "notes.txt").write_text("not ours")
    checkpoints.clean(["cat", "notes.txt"])
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["dog.safetensors", "notes.txt"]

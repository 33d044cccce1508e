import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpcdit.errors import InputError
from hpcdit.models.loading import ModelShape
from hpcdit.output.catalog import Entry
from hpcdit.output.trace import EVENT
from hpcdit.render.manifest import TRACE_BYTES, detailed_steps, estimate_bytes, fits
from hpcdit.render.resume import key_of, partition
from tests.unit.test_manifest import DEFAULTS, jobs_of


def test_finished_videos_are_told_from_those_to_do(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "a\nb\nc", ".txt")
    records = {job.id: json.loads(json.dumps(job.key())) for job in (jobs[2], jobs[0])}
    assert partition(jobs, records) == ((jobs[0], jobs[2]), (jobs[1],))
    assert partition(jobs, {**records, "of another file": {}})[0] == (jobs[0], jobs[2])
    assert partition(jobs, {}) == ((), jobs)


@pytest.mark.parametrize(
    ("line", "difference"),
    [
        ('"prompt": "b"', "prompt: 'b' is asked for, but the finished videos/x.h5 has 'a';"),
        ('"prompt": "a", "negative_prompt": "n"', "negative_prompt: 'n' is asked for"),
        ('"prompt": "a", "seed": 8', "sampling.seed: 8 is asked for, but the finished videos/x.h5 has 7;"),
        ('"prompt": "a", "guidance_scale": 4.5', "sampling.guidance_scale: 4.5 is asked for"),
        (
            '"prompt": "a", "scheduler": "B"',
            "sampling.scheduler: 'B' is asked for, but the finished videos/x.h5 has '';",
        ),
    ],
)
def test_a_finished_video_is_never_taken_for_another(tmp_path: Path, line: str, difference: str) -> None:
    (was,) = jobs_of(tmp_path, '{"prompt": "a", "id": "x"}')
    asked = jobs_of(tmp_path, f'{{{line}, "id": "x"}}')
    with pytest.raises(InputError) as caught:
        partition(asked, {"x": was.key()})
    assert str(caught.value).startswith(f"{tmp_path}/prompts.jsonl:1: {difference}")
    assert "such videos" not in str(caught.value)


def test_a_video_of_before_schedulers_could_be_chosen_was_made_by_the_model_s_own(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, '{"prompt": "a", "id": "x"}', scheduler="Own")
    key = json.loads(json.dumps(jobs[0].key()))
    del key["sampling"]["scheduler"]
    entry = Entry("x", 0, 0, **{**key, "seed": 7, "model": {}, "seconds": 1.0})
    assert partition(jobs, {"x": key_of(entry, "Own")}) == (jobs, ())
    with pytest.raises(InputError, match=r"sampling\.scheduler: 'Own' is asked for, but .* has 'Other'"):
        partition(jobs, {"x": key_of(entry, "Other")})


def test_all_finished_videos_with_other_content_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    was = jobs_of(tmp_path, "a\nb\nc", ".txt")
    now = jobs_of(tmp_path, "a\nb\nc", ".txt", seed=8)
    with pytest.raises(InputError, match=r"prompts\.txt:1: sampling\.seed: 8 .* has 7 \(3 such videos\)"):
        partition(now, {job.id: job.key() for job in was})


def test_a_key_that_only_the_finished_video_has_is_a_difference(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, "a", ".txt")
    with pytest.raises(InputError, match=r"sampling\.shift: null is asked for, .* has null"):
        partition((job,), {job.id: {**job.key(), "sampling": {**job.key()["sampling"], "shift": None}}})


def test_long_prompts_are_shown_from_where_they_differ(tmp_path: Path) -> None:
    (was,) = jobs_of(tmp_path, json.dumps({"prompt": "word " * 1000 + "cat", "id": "x"}))
    now = jobs_of(tmp_path, json.dumps({"prompt": "word " * 1000 + "dog", "id": "x"}))
    with pytest.raises(InputError) as caught:
        partition(now, {"x": was.key()})
    assert "word dog' is asked for" in str(caught.value)
    assert "word cat';" in str(caught.value)


def test_a_size_that_the_model_cannot_make_is_refused_with_its_line_or_key(tmp_path: Path) -> None:
    shape = ModelShape(2, 5, 14, 16, (1, 2, 2), 4, 8)
    fits(jobs_of(tmp_path, "a\nb", ".txt"), DEFAULTS, shape)
    lines = jobs_of(tmp_path, '{"prompt": "a"}\n{"prompt": "b", "num_frames": 10}')
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: num_frames: 10 .*nearest: 9 or 13"):
        fits(lines, DEFAULTS, shape)
    wide = replace(DEFAULTS, width=97)
    with pytest.raises(InputError, match=r"^sampling\.width: 97 .*nearest: 96 or 112"):
        fits(jobs_of(tmp_path, '{"prompt": "a"}', width=97), wide, shape)


def test_a_scheduler_that_the_model_is_not_denoised_by_is_refused_with_its_line_or_key(tmp_path: Path) -> None:
    shape = ModelShape(2, 5, 14, 16, (1, 2, 2), 4, 8, schedulers=("A", "B"))
    fits(jobs_of(tmp_path, '{"prompt": "a", "scheduler": "A"}'), replace(DEFAULTS, scheduler="B"), shape)
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: scheduler: C; allowed: A, B, as of this model$"):
        fits(jobs_of(tmp_path, '{"prompt": "a", "scheduler": "C"}'), DEFAULTS, shape)
    with pytest.raises(InputError, match=r"^sampling\.scheduler: C; allowed: A, B, as of this model$"):
        fits(jobs_of(tmp_path, '{"prompt": "a"}', scheduler="C"), replace(DEFAULTS, scheduler="C"), shape)


def test_the_disk_space_asked_for_holds_all_frames_uncompressed(tmp_path: Path) -> None:
    one, two = (estimate_bytes(jobs_of(tmp_path, "a\n" * n, ".txt", height=1600, width=1600)) for n in (1, 2))
    assert two == 2 * one
    frames = 9 * 1600 * 1600 * 3
    assert frames < one < frames * 1.3 + (4 << 20)
    assert estimate_bytes(()) == 0
    bare = estimate_bytes(jobs_of(tmp_path, "a\n", ".txt", height=1600, width=1600), traced=False)
    assert bare == frames


def test_however_many_ranks_record_a_trace_takes_no_more_than_was_asked_for() -> None:
    a_step = TRACE_BYTES // EVENT.itemsize // 10  # spans: ten steps of them, and of larger videos more
    small, large = replace(DEFAULTS, height=16, width=16, num_frames=1), replace(DEFAULTS, height=1600, width=1600)
    assert detailed_steps(small, a_step) == 10 and 10 < detailed_steps(large, a_step) < 100
    assert detailed_steps(small, 1000 * a_step) == 1, "one is recorded in any case"

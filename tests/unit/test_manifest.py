import errno
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpcdit.config import Sampling
from hpcdit.errors import InputError
from hpcdit.keys import SAMPLING_RULES
from hpcdit.models.loading import ModelShape
from hpcdit.render.manifest import FILE_BYTES, JOBS, Job, fits, read
from tests.checkpoints import write_picture

EXAMPLES = int(os.environ.get("HPCDIT_EXAMPLES", "250"))  # of each test of any input
DEFAULTS = Sampling(
    num_frames=9, height=48, width=80, steps=4, guidance_scale=4.0, seed=7, fps=16, max_sequence_length=32
)


def jobs_of(folder: Path, content: str | bytes, suffix: str = ".jsonl", **defaults: Any) -> tuple[Job, ...]:
    path = folder / f"prompts{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path, Sampling(**{**vars(DEFAULTS), **defaults}))


def error_of(folder: Path, content: str | bytes, suffix: str = ".jsonl") -> str:
    """The one line that `content` is refused with, without the folder."""
    with pytest.raises(InputError) as caught:
        jobs_of(folder, content, suffix)
    message = str(caught.value)
    assert message.isprintable(), "one line without control characters"
    assert len(message) < 500
    assert "allowed: " in message
    return message.replace(f"{folder}/", "")


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    text = "\ufeff# captions\r\n\r\n  a red cat \r\n#no\n  # no\nЁж, 家 & <b>\n\t\nlast # not a comment"
    jobs = jobs_of(tmp_path, text, ".txt")
    assert [job.prompt for job in jobs] == ["a red cat", "Ёж, 家 & <b>", "last # not a comment"]
    assert [job.id for job in jobs] == ["00000-a-red-cat", "00001-b", "00002-last-not-a-comment"]
    assert [job.where.rpartition(":")[2] for job in jobs] == ["3", "6", "8"]
    assert all(job.negative_prompt == "" for job in jobs)


def test_a_json_line_may_say_everything_about_its_video(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 16, "steps": 2, "fps": 8, "max_sequence_length": 9}
    line = {
        "prompt": " a\ncat ",
        "id": "cat №1",
        "negative_prompt": "dog",
        "seed": 3,
        "guidance_scale": 5,
        **sizes,
    }
    (job,) = jobs_of(tmp_path, json.dumps(line))
    assert (job.index, job.id, job.prompt, job.negative_prompt) == (0, "cat №1", " a\ncat ", "dog")
    assert job.sampling == Sampling(**sizes, guidance_scale=5.0, seed=3)
    assert isinstance(job.sampling.guidance_scale, float)


def test_what_a_line_leaves_out_comes_from_the_defaults_and_the_seed_from_its_place(tmp_path: Path) -> None:
    lines = '{"prompt": "a"}\n\n{"prompt": "b", "seed": 100}\n{"prompt": "c", "steps": 9}\n'
    jobs = jobs_of(tmp_path, lines, seed=40)
    assert [job.sampling.seed for job in jobs] == [40, 100, 42]
    assert [job.sampling.steps for job in jobs] == [4, 4, 9]
    assert [job.index for job in jobs] == [0, 1, 2]


def test_seeds_stay_below_2_to_the_63(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "a\nb\nc\n", ".txt", seed=2**63 - 2)
    assert [job.sampling.seed for job in jobs] == [2**63 - 2, 2**63 - 1, 0]
    assert jobs_of(tmp_path, '{"prompt": "a", "seed": 9223372036854775807}')[0].sampling.seed == 2**63 - 1


def test_the_default_id_is_short_plain_and_never_empty(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "家\n" + "Word-" * 30 + "\n/../\\ ..É\n", ".txt")
    assert [job.id for job in jobs] == ["00000", "00001-" + "word-" * 7 + "word", "00002"]


def test_the_name_of_the_file_tells_its_format(tmp_path: Path) -> None:
    for name in ("prompts", "prompts.json", "prompts.csv", ".txt"):
        (tmp_path / name).write_text("a")
        with pytest.raises(InputError, match=r"^prompts: .*allowed: .*\.txt or \.jsonl$"):
            read(tmp_path / name, DEFAULTS)
    (tmp_path / "a.TXT").write_text("a")
    assert len(read(tmp_path / "a.TXT", DEFAULTS)) == 1


def test_only_a_regular_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    reasons = {
        "none.txt": "No such file",
        "folder.txt": "is a folder",
        "pipe.txt": "not a regular file",
        "loop.txt": "symbolic links",
        "a" * 300 + ".txt": "too long",
        "nul\0.txt": "null byte",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=rf"^prompts: .*{reason}"):
            read(tmp_path / name, DEFAULTS)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "closed.txt").write_text("a")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        read(tmp_path / "closed.txt", DEFAULTS)


def test_a_file_without_a_prompt_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n\n", "# only\n  # comments\n", "\ufeff"):
        assert error_of(tmp_path, content, ".txt").startswith("prompts.txt: no prompt in it")
    assert error_of(tmp_path, " \n").startswith("prompts.jsonl: no prompt in it")


LINES_THAT_ARE_NO_JOB = {
    "[]": "prompts.jsonl:2: a list is not an object",
    "7": "prompts.jsonl:2: 7 is not an object",
    "null": "prompts.jsonl:2: null is not an object",
    "{": "prompts.jsonl:2: not JSON: ",
    "a cat": "prompts.jsonl:2: not JSON: Expecting value at column 1",
    '{"prompt": "a"} {"prompt": "b"}': "prompts.jsonl:2: not JSON: Extra data at column 17",
    "{'prompt': 'a'}": "prompts.jsonl:2: not JSON: ",
    "# no comments here": "prompts.jsonl:2: not JSON: ",
    "[" * 100_000: "prompts.jsonl:2: not JSON: nested too deep",
    '{"seed": ' + "9" * 5000 + "}": "prompts.jsonl:2: not JSON: a number with too many digits",
    '{"prompt": "a", "prompt": "b"}': "prompts.jsonl:2: prompt: there twice",
    '{"prompt": "a", "id": {"x": 1, "x": 1}}': "prompts.jsonl:2: x: there twice",
    '{"prompt": "a", "promt": 1}': "prompts.jsonl:2: promt: unknown field, did you mean prompt?",
    '{"prompt": "a", "width_": 1}': "prompts.jsonl:2: width_: unknown field, did you mean width?",
    '{"prompt": "a", "\\n\\u001b[31m": 1}': "prompts.jsonl:2: \\x1b[31m: unknown field; allowed: prompt",
    '{"prompt": "a", "image": "cat.png"}': "prompts.jsonl:2: image: 'cat.png': No such file or directory; allowed",
    '{"prompt": "a", "image": "prompts.jsonl"}': "prompts.jsonl:2: image: 'prompts.jsonl': not a picture; allowed: ",
    '{"prompt": "a", "image": 7}': "prompts.jsonl:2: image: 7; allowed: text",
    "{}": "prompts.jsonl:2: prompt: missing",
    '{"prompt": ""}': "prompts.jsonl:2: prompt: empty",
    '{"prompt": " \\n\\t\\u3000"}': "prompts.jsonl:2: prompt: empty",
    '{"prompt": null}': "prompts.jsonl:2: prompt: null; allowed: text",
    '{"prompt": 7}': "prompts.jsonl:2: prompt: 7; allowed: text",
    '{"prompt": ["a"]}': "prompts.jsonl:2: prompt: a list; allowed: text",
    '{"prompt": "a\\u0000b"}': "prompts.jsonl:2: prompt: 'a\\x00b'; allowed: text without NUL",
    '{"prompt": "a\\ud800b"}': "prompts.jsonl:2: prompt: 'a\\ud800b'; allowed: text without NUL",
    '{"prompt": "a", "negative_prompt": false}': "prompts.jsonl:2: negative_prompt: false; allowed: text",
    '{"prompt": "a", "negative_prompt": "\\u0000"}': "prompts.jsonl:2: negative_prompt: '\\x00'; allowed",
    '{"prompt": "a", "id": 7}': "prompts.jsonl:2: id: 7; allowed: 1 to 200 bytes",
}


@pytest.mark.parametrize("line", LINES_THAT_ARE_NO_JOB, ids=range(len(LINES_THAT_ARE_NO_JOB)))
def test_a_line_that_is_no_job_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    assert error_of(tmp_path, f'{{"prompt": "a"}}\n{line}\n').startswith(LINES_THAT_ARE_NO_JOB[line])


@pytest.mark.parametrize("key", SAMPLING_RULES)
def test_a_sampling_key_takes_what_it_takes_on_the_command_line(tmp_path: Path, key: str) -> None:
    for value in (
        "true",
        "-1",
        "-0.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "9" * 400,
        '"4"',
        "null",
        "[4]",
    ):
        message = error_of(tmp_path, f'{{"prompt": "a", "{key}": {value}}}')
        assert message.startswith(f"prompts.jsonl:1: {key}: ")
        assert message.endswith(f"; allowed: {SAMPLING_RULES[key].allowed}")
    if key not in ("guidance_scale", "seed"):
        error_of(tmp_path, f'{{"prompt": "a", "{key}": 0}}')
    if key != "guidance_scale":
        error_of(tmp_path, f'{{"prompt": "a", "{key}": 4.0}}')


UNFIT = ("", " ", "a/b", "a\\b", "..", "a..b", ".a", "-a", " a", "a ", "é" * 101, "a" * 201)
UNPRINTABLE = ("\n", "a\tb", "\0", "\x7f", "\u202e", "\ud800")


@pytest.mark.parametrize("name", [*UNFIT, *UNPRINTABLE])
def test_an_id_that_cannot_name_a_file_is_refused(tmp_path: Path, name: str) -> None:
    message = error_of(tmp_path, json.dumps({"prompt": "a", "id": name}))
    assert message.startswith("prompts.jsonl:1: id: ")
    assert "allowed: 1 to 200 bytes" in message


def test_an_id_may_be_any_other_name(tmp_path: Path) -> None:
    for name in ("a", "0", "é" * 100, "a.b-c_d e", "家", "a" * 200):
        assert jobs_of(tmp_path, json.dumps({"prompt": "a", "id": name}))[0].id == name


def test_an_id_is_there_once_on_any_file_system(tmp_path: Path) -> None:
    def pair(one: str, other: str) -> str:
        return error_of(tmp_path, "\n".join(json.dumps({"prompt": "a", "id": name}) for name in (one, "x", other)))

    assert pair("a", "a").startswith("prompts.jsonl:3: id: 'a' is already used in line 1")
    assert pair("Cat", "cAT").startswith("prompts.jsonl:3: id: 'cAT' is the same file as 'Cat' on some systems")
    assert "used in line 1" in pair("é", "e\u0301")
    assert "already used in line 1" in error_of(tmp_path, '{"prompt": "a", "id": "00001-b"}\n{"prompt": "b"}')


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl"):
        message = error_of(tmp_path, b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n', suffix)
        assert message.startswith(f"prompts{suffix}:3: byte 0xe9 at column 16 is not UTF-8")
        assert ":1: byte 0xff at column 1 " in error_of(tmp_path, "a".encode("utf-16"), suffix)


def test_a_text_line_holds_neither_nul_nor_a_lone_carriage_return(tmp_path: Path) -> None:
    assert error_of(tmp_path, b"a\nb\0c\n", ".txt").startswith("prompts.txt:2: prompt: 'b\\x00c'")
    assert error_of(tmp_path, b"a\rb\rc", ".txt").startswith("prompts.txt:1: a carriage return")


def test_a_line_is_at_most_a_mebibyte(tmp_path: Path) -> None:
    assert len(jobs_of(tmp_path, "a" * (1 << 20), ".txt")[0].prompt) == 1 << 20
    assert error_of(tmp_path, "a\n" + "b" * (1 << 20) + "\nc", ".txt").startswith("prompts.txt:2: a longer line")


def test_a_huge_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    with (tmp_path / "huge.txt").open("wb") as file:
        file.write(b"a cat\n")
        file.truncate(1 << 28)  # no blocks on disk: it reads as zeros
    tracemalloc.start()
    with pytest.raises(InputError, match=r"huge\.txt:2: a longer line"):
        read(tmp_path / "huge.txt", DEFAULTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_file_that_is_larger_than_any_rank_should_hold_is_refused_early(tmp_path: Path) -> None:
    comment, path = b"#" * ((1 << 20) - 1) + b"\n", tmp_path / "large.txt"
    with path.open("wb") as file:
        file.write(b"a cat\n" + comment * (FILE_BYTES // len(comment) - 1))
    assert len(read(path, DEFAULTS)) == 1
    with path.open("ab") as file:
        file.write(comment * 4)
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"large\.txt:65: a larger file; allowed: 67108864 bytes a file$"):
        read(path, DEFAULTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_file_has_at_most_so_many_videos(tmp_path: Path) -> None:
    assert len(jobs_of(tmp_path, "a\n" * JOBS, ".txt")) == JOBS
    message = error_of(tmp_path, "a\n" * JOBS + "# no\nb\n" * 3, ".txt")
    assert message == f"prompts.txt:{JOBS + 2}: more videos; allowed: {JOBS} a file"


def test_a_line_of_many_small_objects_takes_little_memory(tmp_path: Path) -> None:
    line = '{"prompt": "a", "id": [' + ",".join(["{}"] * 340_000) + "]}"
    tracemalloc.start()
    assert "prompts.jsonl:1: id: a list" in error_of(tmp_path, line)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xef\xbb\xbf")
@example(b'{"prompt": "\\ud800"}')
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_are_jobs_or_one_line_that_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix in (".txt", ".jsonl"):
        jobs_or_error(folder, data, suffix)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["prompt", "id", "negative_prompt", "image", *SAMPLING_RULES]) | st.text(max_size=9)


@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=5) | JSON, max_size=4))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_json_lines_are_jobs_or_one_line_that_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any]
) -> None:
    jobs_or_error(tmp_path_factory.getbasetemp(), "\n".join(map(json.dumps, values)).encode(), ".jsonl")


# What has broken parsers, put anywhere into a line that is well otherwise.
NASTY = st.sampled_from([
    *("\0", "\ud800", "\\ud800", "\\u0000", '"', "\\", "{", "[" * 2000, "1e999", "-0", "9" * 5000, "NaN", "\ufeff"),
    *("../", "..", "/", "\r", "\n", "\x85", "\u2028", ",", ":", "}", "true", "null", "e\u0301", "İ", "ß", "a" * 300),
])  # fmt: skip
WELL = '{"prompt": "a circle", "id": "Größe", "negative_prompt": "mud", "seed": 7, "guidance_scale": 4.5, "steps": 9}'


@given(st.lists(st.tuples(st.integers(0, len(WELL)), st.integers(0, 9), NASTY), min_size=1, max_size=3), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_line_with_anything_put_into_it_is_a_job_or_one_line_that_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]], plain: bool
) -> None:
    line = WELL
    for place, cut, text in edits:
        line = line[:place] + text + line[place + cut :]
    data = f"{line}\n{WELL}\n".encode("utf-8", "surrogatepass")
    jobs_or_error(tmp_path_factory.getbasetemp(), data, ".txt" if plain else ".jsonl")


def jobs_or_error(folder: Path, data: bytes, suffix: str) -> None:
    try:
        jobs = jobs_of(folder, data, suffix)
    except InputError as error:
        assert str(error).isprintable()
        return
    assert len({job.id for job in jobs}) == len(jobs) > 0
    assert [job.index for job in jobs] == list(range(len(jobs)))
    for job in jobs:
        assert job.prompt.strip()
        assert 0 <= job.sampling.seed < 2**63
        assert json.loads(json.dumps(job.key())) == job.key()
        assert (folder / f"{job.id}.h5").parent == folder, "an id is one file name"
        job.id.encode()


def test_the_key_of_a_job_is_its_content_and_nothing_of_its_place(tmp_path: Path) -> None:
    (one,) = jobs_of(tmp_path, '{"prompt": "a", "seed": 8, "id": "x"}')
    _, other = jobs_of(tmp_path, "b\na", ".txt")
    assert one.key() == other.key()
    assert one.key() == {"prompt": "a", "negative_prompt": "", "sampling": {**vars(DEFAULTS), "seed": 8}}
    for line in ('"prompt": "A"', '"prompt": "a", "negative_prompt": "b"', '"prompt": "a", "fps": 17'):
        assert jobs_of(tmp_path, f'{{{line}, "seed": 8}}')[0].key() != one.key()


WAN = ModelShape(40, 40, 128, 16, (1, 2, 2), 4, 8, multiple=16)


def test_a_picture_is_a_part_of_what_identifies_a_video(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    write_picture(tmp_path / "c.png", (71, 50))
    lines = "".join(f'{{"prompt": "a", "seed": 8, "id": "{name}", "image": "{name}.png"}}\n' for name in "abc")
    a, b, c = jobs_of(tmp_path, lines)
    (none,) = jobs_of(tmp_path, '{"prompt": "a", "seed": 8}')
    assert a.image == str(tmp_path / "a.png") and a.key() == b.key()
    assert len({json.dumps(job.key()) for job in (a, c, none)}) == 3


def test_a_picture_is_there_if_the_model_starts_from_one(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png")
    jobs = jobs_of(tmp_path, '{"prompt": "a", "image": "a.png"}\n{"prompt": "b"}')
    with pytest.raises(InputError, match="jsonl:2: image: missing, this model starts from a picture; allowed: a path"):
        fits(jobs, DEFAULTS, replace(WAN, image=True))
    with pytest.raises(InputError, match="jsonl:1: image: this model takes none"):
        fits(jobs, DEFAULTS, WAN)


@pytest.mark.parametrize("size, said", [((15, 50), "15 x 50 pixels"), ((16, 16), "")])
def test_a_picture_has_sides(tmp_path: Path, size: tuple[int, int], said: str) -> None:
    write_picture(tmp_path / "a.png", size)
    line = '{"prompt": "a", "image": "a.png"}'
    if not said:
        assert jobs_of(tmp_path, line)[0].image_sha256
        return
    with pytest.raises(InputError, match=f"{said}; allowed: a picture that can be read"):
        jobs_of(tmp_path, line)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="allowed: a picture that can be read"):
        jobs_of(tmp_path, line)

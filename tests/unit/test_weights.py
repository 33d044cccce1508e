import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcdit.errors import InputError
from hpcdit.models.loading import inspect
from hpcdit.models.weights import read_header
from tests.checkpoints import MODEL_WEIGHTS, edit, refusal, write_json, write_wan, write_zeros


@pytest.fixture(name="wan")
def whole_checkpoint(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "wan")


def test_a_weight_file_that_was_cut_off_anywhere_is_refused(wan: Path) -> None:
    whole = (wan / MODEL_WEIGHTS).read_bytes()
    for size in (1, 7, 8, 9, 100, len(whole) - 1, len(whole) + 1):
        (wan / MODEL_WEIGHTS).write_bytes((whole + b"\0")[:size])
        where = "not a safetensors file, or cut off in its header" if size < 200 else f"{len(whole)}"
        assert refusal(wan).startswith(f"{MODEL_WEIGHTS}: ") and where in refusal(wan)


HEADERS: tuple[Any, ...] = (
    {"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F16", "shape": [2], "data_offsets": [2, 6]}},
    {"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, -4]}},
    {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0]}},
    {"a": {"dtype": "F16", "shape": "2", "data_offsets": ["0", "4"]}},
    {"a": {"dtype": "what", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"shape": [2], "data_offsets": [0, 4]}},
    {"a": 1},
    [],
    {f"{i}": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]} for i in range(2)},
)


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(InputError, match=r"a\.safetensors: not a safetensors file"):
        read_header(tmp_path / "a.safetensors")


@given(st.binary(max_size=60), st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_header_or_one_line_that_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    try:
        read_header(path)
    except InputError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "a.pth", "wan.ckpt", "w.pkl"])
def test_pickled_weights_are_refused_with_the_way_out(wan: Path, name: str) -> None:
    (wan / MODEL_WEIGHTS).rename(wan / "transformer" / name)
    message = refusal(wan)
    assert message.startswith(f"transformer/{name}: pickled weights, which are never loaded")
    assert "save_pretrained(folder, safe_serialization=True)" in message


def test_pickles_beside_safetensors_do_no_harm(wan: Path) -> None:
    (wan / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80")
    assert "transformer/diffusion_pytorch_model.bin" not in inspect(wan).files


def test_weights_under_another_name_are_named(wan: Path) -> None:
    (wan / MODEL_WEIGHTS).rename(wan / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    assert refusal(wan).endswith("found 'diffusion_pytorch_model.fp16.safetensors', a name that is not loaded")


def shards(wan: Path) -> Path:
    """Cuts the transformer's weights into two files and an index, which is returned."""
    tensors = read_header(wan / MODEL_WEIGHTS)
    (wan / MODEL_WEIGHTS).unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        write_zeros(wan / "transformer" / file, {n: size for n, size in tensors.items() if names[n] == file})
    index = wan / f"{MODEL_WEIGHTS}.index.json"
    write_json(index, {"metadata": {}, "weight_map": names})
    return index


def test_sharded_weights_need_every_shard_and_tensor(wan: Path) -> None:
    index = shards(wan)
    assert {"transformer/part-0.safetensors", "transformer/part-1.safetensors"} < set(inspect(wan).files)
    write_json(index, {"metadata": {}, "weight_map": {"x": "part-0.safetensors"}})
    assert refusal(wan).startswith("transformer/part-0.safetensors: tensor 'x' is missing")
    write_json(index, {"metadata": {}, "weight_map": {"x": "part-2.safetensors"}})
    assert refusal(wan).startswith("transformer/part-2.safetensors: no such file")
    for bad in (
        "../vae/diffusion_pytorch_model.safetensors",
        "/a.safetensors",
        "a.bin",
        "a\n.safetensors",
        7,
        None,
    ):
        write_json(index, {"metadata": {}, "weight_map": {"x": bad}})
        assert "weight_map: allowed: names of .safetensors files" in refusal(wan)
    missing: tuple[Any, ...] = ({}, [], "x", None)
    for none in missing:
        write_json(index, {"metadata": {}, "weight_map": none})
        assert "weight_map: missing" in refusal(wan)


def test_where_both_are_there_the_file_counts_that_is_loaded(wan: Path) -> None:
    index = {"metadata": {}, "weight_map": {"x": "none.safetensors"}}
    write_json(wan / "text_encoder" / "model.safetensors.index.json", index)
    inspect(wan)
    write_json(wan / f"{MODEL_WEIGHTS}.index.json", index)
    assert refusal(wan).startswith("transformer/none.safetensors: no such file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 4}, "transformer: tensor blocks.3.attn1.to_q.weight is missing"),
        ({"num_layers": 2}, "transformer/config.json: num_layers: 2, but the weight files hold more"),
        (
            {"num_attention_heads": 6},
            "transformer: tensor patch_embedding.weight has shape [70, 16, 1, 2, 2]; ",
        ),
        ({"patch_size": [1, 2, 4]}, "transformer: tensor patch_embedding.weight has shape"),
    ],
)
def test_the_weights_have_the_layers_and_sizes_of_the_configuration(
    wan: Path, values: dict[str, Any], message: str
) -> None:
    edit(wan / "transformer" / "config.json", **values)
    assert refusal(wan).startswith(message)


def test_the_fingerprint_is_of_the_content_alone(wan: Path) -> None:
    before = inspect(wan).fingerprint
    assert len(before) == 64
    copy = wan.parent / "elsewhere"
    shutil.copytree(wan, copy)
    (copy / "README.md").write_text("not loaded, does not count")
    assert inspect(copy).fingerprint == before
    for name in inspect(copy).files:
        content = (copy / name).read_bytes()
        last = b"\1" if name.endswith(".safetensors") else b" "
        (copy / name).write_bytes((content[:-1] + last) if last == b"\1" else content + last)
        assert inspect(copy).fingerprint != before, name
        (copy / name).write_bytes(content)


def test_the_fingerprint_of_large_weights_is_of_their_header_and_both_ends(wan: Path) -> None:
    path = wan / "text_encoder" / "model.safetensors"
    write_zeros(path, {"shared.weight": (1 << 18, 1), "é": ()})
    before, content = inspect(wan).fingerprint, path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    for place in (content.index(b"00e9") + 3, first, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert inspect(wan).fingerprint != before

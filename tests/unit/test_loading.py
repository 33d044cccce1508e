import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdit.config import demo_model
from hpcdit.models.families import families
from hpcdit.models.loading import ModelShape, inspect, shape
from tests.checkpoints import MODEL_WEIGHTS, edit, refusal, write_wan


@pytest.fixture(name="wan")
def whole_checkpoint(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "wan")


def test_a_whole_checkpoint_passes(wan: Path) -> None:
    folder = inspect(wan)
    assert (folder.path, folder.family) == (wan, "wan")
    assert set(folder.files) == {str(path.relative_to(wan)) for path in wan.rglob("*") if path.is_file()}
    assert folder.files[MODEL_WEIGHTS] == (wan / MODEL_WEIGHTS).stat().st_size
    assert folder.transformer["num_layers"] == 3
    assert folder.parts["scheduler"]["flow_shift"] == 3.0
    assert shape(folder) == ModelShape(3, 5, 14, 16, (1, 2, 2), 4, 8, 30, 16, ffn_dim=13824)


def test_the_demo_model_passes() -> None:
    assert shape(inspect(demo_model())) == ModelShape(6, 12, 24, 8, (1, 2, 2), 4, 8, 64, 16, ffn_dim=768)


def test_the_check_needs_neither_torch_nor_diffusers(wan: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hpcdit.models.loading import inspect; "
        f"inspect(Path({str(wan)!r})); print({{'torch', 'diffusers', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, wan: Path) -> None:
    assert refusal(tmp_path / "none").endswith(
        "does not exist on this machine; allowed: a checkpoint folder in diffusers' format"
    )
    assert "is a file" in refusal(wan / "model_index.json")
    (tmp_path / "link").symlink_to("none")
    assert "is a broken link" in refusal(tmp_path / "link")
    assert "does not exist" in refusal(tmp_path / "a\0b")
    assert "File name too long" in refusal(tmp_path / ("a" * 300))
    assert refusal(tmp_path).endswith("in diffusers' format; did you mean 'wan'?")
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    wan.rename(tmp_path / "models--a--b" / "snapshots" / "1f2e")
    assert refusal(tmp_path / "models--a--b").endswith("did you mean 'snapshots/1f2e'?")


NO_CODE = "classes of diffusers and transformers; custom code is never run"


@pytest.mark.parametrize(
    ("key", "value", "shown", "allowed"),
    [
        (
            "_class_name",
            "WanVACEPipeline",
            "'WanVACEPipeline'",
            "CogVideoXPipeline, CogVideoXImageToVideoPipeline, FluxPipeline, ",
        ),
        ("_class_name", None, "None", NO_CODE),
        ("_class_name", ["mine", "Mine"], "['mine', 'Mine']", NO_CODE),
        ("boundary_ratio", 0.875, "0.875", "null (one transformer, as in Wan 2.1"),
        ("expand_timesteps", 1, "1", "true or false"),
        ("transformer_2", ["diffusers", "Flux"], "['diffusers', 'Flux']", "WanTransformer3DModel"),
        ("vae", None, "None", '["diffusers", "AutoencoderKLWan"]'),
        ("vae", [None, None], "[None, None]", '["diffusers", "AutoencoderKLWan"]'),
        ("vae", ["diffusers", "AutoencoderKL"], "['diffusers', 'AutoencoderKL']", "AutoencoderKLWan"),
        ("vae", ["transformers", "AutoencoderKLWan"], "['transformers', ", "AutoencoderKLWan"),
        ("vae", ["my_vae", "AutoencoderKLWan"], "['my_vae', 'AutoencoderKLWan']", NO_CODE),
        ("vae", ["os", "system"], "['os', 'system']", NO_CODE),
        ("vae", [["diffusers"], {}], "[['diffusers'], {}]", NO_CODE),
        ("scheduler", ["diffusers", "DDPMScheduler"], "['diffusers', 'DDPMScheduler']", "UniPCMultistep"),
        ("custom_pipeline", "mine", "'mine'", NO_CODE),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(wan: Path, key: str, value: object, shown: str, allowed: str) -> None:
    edit(wan / "model_index.json", **{key: value})
    message = refusal(wan)
    assert message.startswith(f"model_index.json: {key}: {shown}")
    assert f" is not supported; allowed: {allowed}" in message


def test_pipelines_with_one_expert_may_say_so(wan: Path) -> None:
    edit(wan / "model_index.json", transformer_2=[None, None], boundary_ratio=None, expand_timesteps=False)
    assert inspect(wan).pipeline == "WanPipeline"


def test_a_module_that_would_take_the_place_of_a_library_is_refused(wan: Path) -> None:
    (wan / "vae" / "diffusers.py").write_text("class AutoencoderKLWan: ...")
    assert "custom code is never run" in refusal(wan)


@pytest.mark.parametrize(
    ("file", "values", "allowed"),
    [
        ("transformer", {"_class_name": "WanVACETransformer3DModel"}, "WanTransformer3DModel"),
        ("transformer", {"auto_map": {"AutoModel": "mine.Model"}}, NO_CODE),
        ("transformer", {"quantization_config": {"load_in_4bit": True}}, "none (weights in float32"),
        ("transformer", {"num_layers": 0}, "a whole number"),
        ("transformer", {"num_layers": True}, "a whole number"),
        ("transformer", {"num_layers": 1e2}, "a whole number"),
        ("transformer", {"num_attention_heads": None}, "a whole number"),
        ("transformer", {"attention_head_dim": 13}, "an even number, at least 6"),
        ("transformer", {"attention_head_dim": "x" * 99}, "an even number, at least 6"),
        ("transformer", {"patch_size": [2, 2]}, "three whole numbers"),
        ("transformer", {"patch_size": [1, 2, -2]}, "three whole numbers"),
        ("transformer", {"in_channels": 36}, "as in_channels, 36"),
        ("transformer", {"in_channels": 36, "out_channels": 36}, "16, the VAE's z_dim"),
        ("transformer", {"image_dim": 1280}, "null (text to video"),
        ("transformer", {"added_kv_proj_dim": 1536}, "null (text to video"),
        ("transformer", {"rope_max_seq_len": -1}, "a whole number"),
        ("transformer", {"text_dim": 13}, "12, the text encoder's d_model"),
        ("vae", {"_class_name": "AutoencoderKL"}, "AutoencoderKLWan"),
        ("vae", {"z_dim": 0}, "a whole number"),
        ("vae", {"z_dim": 48}, "a list of z_dim = 48 numbers"),
        ("vae", {"dim_mult": []}, "a list of whole numbers"),
        ("vae", {"dim_mult": [1] * 2000}, "a list of whole numbers"),
        ("vae", {"temperal_downsample": [True]}, "a list of 3 true or false"),
        ("vae", {"temperal_downsample": [True, True, True]}, "8, as its layers make"),
        ("vae", {"scale_factor_spatial": 16}, "8, as its layers make"),
        ("vae", {"patch_size": 2}, "16, as its layers make"),
        ("vae", {"patch_size": True}, "null or a whole number"),
        ("vae", {"out_channels": 12}, "3, as its layers make"),
        ("vae", {"latents_mean": [0.0] * 15}, "a list of z_dim = 16 numbers"),
        ("vae", {"latents_mean": [float("nan")] * 16}, "a list of z_dim = 16 numbers"),
        ("vae", {"latents_std": [0] + [1] * 15}, "a list of z_dim = 16 numbers, none 0"),
        ("text_encoder", {"d_model": 13}, "13, the text encoder's d_model"),
        ("text_encoder", {"trust_remote_code": True}, NO_CODE),
        ("tokenizer", {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}, NO_CODE),
        ("scheduler", {"stochastic_sampling": True}, "false (every rank"),
        ("scheduler", {"algorithm_type": "sde-dpmsolver++"}, "none that starts with sde"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(wan: Path, file: str, values: dict[str, Any], allowed: str) -> None:
    names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    edit(wan / file / names.get(file, "config.json"), **values)
    message = refusal(wan)
    assert ".json: " in message
    assert f" is not supported; allowed: {allowed}" in message
    assert len(message) < 300


POINTER = b"version https://git-lfs.example/spec/v1\noid sha256:00"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no such file; the checkpoint is not complete"),
    "a broken link": (lambda path: path.symlink_to("../blobs/1f"), "a broken link, to '../blobs/1f'"),
    "a folder": (Path.mkdir, "a folder; a file is needed"),
    "a pipe": (os.mkfifo, "not a regular file; a file is needed"),
    "empty": (Path.touch, "empty; the copy is not complete"),
    "a pointer": (lambda path: path.write_bytes(POINTER), "a Git LFS pointer"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_every_file_is_needed_and_whole(wan: Path, how: str) -> None:
    files = [Path(name) for name in inspect(wan).files if name not in ("model_index.json", "tokenizer/tokenizer.json")]
    assert len(files) == 8
    for file in files:
        shutil.copytree(wan, wan.parent / "copy", symlinks=True)
        (wan.parent / "copy" / file).unlink()
        BROKEN[how][0](wan.parent / "copy" / file)
        assert refusal(wan.parent / "copy").startswith(f"{file}: {BROKEN[how][1]}")
        shutil.rmtree(wan.parent / "copy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": \n}', ":3: not JSON: Expecting value"),
        (b'{\n"a": "\xe9"}', ":2: not UTF-8"),
        (b"[" * 100_000, ": not JSON: a number too long or objects nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", ": not JSON: a number too long"),
        (b"[1]", ": not a JSON object"),
    ],
)
def test_a_configuration_is_a_json_object(wan: Path, content: bytes, message: str) -> None:
    for file in ("model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"):
        before = (wan / file).read_bytes()
        (wan / file).write_bytes(content)
        assert refusal(wan).startswith(f"{file}{message}")
        (wan / file).write_bytes(before)


def test_hidden_files_of_other_systems_do_no_harm(wan: Path) -> None:
    (wan / "tokenizer" / "._tokenizer.json").write_bytes(b"\0\5\x16\7")
    assert "tokenizer/._tokenizer.json" not in inspect(wan).files


def test_a_tokenizer_has_a_vocabulary(wan: Path) -> None:
    (wan / "tokenizer" / "tokenizer.json").rename(wan / "tokenizer" / "spiece.model")
    assert "tokenizer/spiece.model" in inspect(wan).files
    (wan / "tokenizer" / "extra.model").symlink_to("none")
    assert refusal(wan).startswith("tokenizer/extra.model: a broken link, to 'none'")
    (wan / "tokenizer" / "extra.model").unlink()
    (wan / "tokenizer" / "spiece.model").write_bytes(b"")
    assert refusal(wan).startswith("tokenizer/spiece.model: empty")
    (wan / "tokenizer" / "spiece.model").unlink()
    assert refusal(wan) == "tokenizer: no vocabulary; allowed: a tokenizer.json or a spiece.model"


def test_links_into_a_cache_are_followed(wan: Path) -> None:
    before = inspect(wan)
    blobs = wan.parent / "blobs"
    blobs.mkdir()
    for i, name in enumerate(before.files):
        (wan / name).rename(blobs / str(i))
        (wan / name).symlink_to(blobs / str(i))
    assert inspect(wan) == before


def test_no_family_is_named_outside_its_adapter() -> None:
    """Neither in the package nor in its tools, but for the benchmarks' list of real models."""
    root = Path(__file__).parents[2]
    lists = {"family_models.py", "family_variants.py", "step_ours.py"}
    for path in (path for folder in ("hpcdit", "tools") for path in (root / folder).rglob("*.py")):
        if path.parent.name != "families" and path.name not in lists:
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
            assert texts.isdisjoint(families()), path

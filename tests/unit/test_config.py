"""The command line: what it means, and one line for every way to get it wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hpcdit.config import Config, Sampling, conf_dir, demo_model, demo_prompts, load, planned_costs, resolve_sampling
from hpcdit.errors import InputError
from hpcdit.keys import RULES
from hpcdit.planner.presets import UNITS

DEMO = Sampling(33, 96, 96, 16, 4.0, 0, 16, 64)
WAN = Sampling(81, 480, 832, 50, 5.0, 0, 16, 512)
LONG = "x" * 10_000


def loaded(*argv: str) -> Config:
    config = load(argv)
    assert config is not None
    return config


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load(argv)
    return str(caught.value)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, and nothing may be made there."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_without_arguments_the_demo_is_rendered() -> None:
    config = loaded()
    assert (config.mode, config.prompts, config.model.path, config.output.dir) == (
        "render",
        None,
        None,
        "outputs/demo",
    )
    assert (config.trace.level, config.transport.timeout_s, config.resume) == (2, 60.0, True)
    assert config.model.dtype == "float32"
    assert resolve_sampling(config, "wan") == DEMO


def test_the_demo_s_files_are_there() -> None:
    assert (demo_model() / "model_index.json").is_file()
    captions = [line for line in demo_prompts().read_text().splitlines() if not line.startswith("#")]
    assert len(captions) == 4


def test_the_demo_s_twin_is_in_the_package_and_has_its_defaults() -> None:
    config = loaded("model=demo-image", "prompts=mine.jsonl")
    assert config.model.path == str(demo_model("demo-image")) and (demo_model("demo-image") / "README.md").is_file()
    assert (config.model.name, config.output.dir) == ("demo-image", "outputs/demo-image")
    assert resolve_sampling(config, "wan") == DEMO
    other = loaded("model=demo-image", "model.path=/models/x")
    assert (other.model.name, resolve_sampling(other, "wan")) == ("x", WAN)


def test_what_is_set_goes_before_the_model_s_defaults() -> None:
    config = loaded("sampling.steps=3", "sampling.seed=9223372036854775807", "sampling.guidance_scale=0")
    assert config.sampling == {"steps": 3, "seed": 2**63 - 1, "guidance_scale": 0.0}
    assert resolve_sampling(config, "wan") == Sampling(33, 96, 96, 3, 0.0, 2**63 - 1, 16, 64)


def test_a_named_folder_gets_its_family_s_defaults_and_its_own_name() -> None:
    config = loaded("model.path=/models/Wan 2.1")
    assert resolve_sampling(config, "wan") == WAN
    assert (config.model.name, config.output.dir) == ("Wan-2.1", "outputs/Wan-2.1")
    assert loaded("model.path=/models/x", "model.name=mine").output.dir == "outputs/mine"


def test_a_family_without_defaults_wants_every_key() -> None:
    config = loaded("model.path=/models/x", "sampling.num_frames=9")
    with pytest.raises(InputError, match=r"sampling\.height: must be given"):
        resolve_sampling(config, "unheard-of")
    with pytest.raises(InputError, match=r"height: must be given, the model has no default for it"):
        resolve_sampling(config, "")


def test_a_model_group_other_than_the_demo_needs_a_folder() -> None:
    assert refusal("model=wan") == "model.path: must name a model folder when model=wan"
    assert resolve_sampling(loaded("model=wan", "model.path=x"), "wan") == WAN


@pytest.mark.parametrize(
    ("group", "layers", "heads", "ffn_dim"), [("wan2.1-1.3b", 30, 12, 8960), ("wan2.1-14b", 40, 40, 13824)]
)
def test_plans_need_no_checkpoint(group: str, layers: int, heads: int, ffn_dim: int) -> None:
    config = loaded("mode=plan", f"model={group}", "cluster.nodes=4", "cluster.ranks_per_node=8")
    assert config.model.shape == {
        "layers": layers,
        "heads": heads,
        "head_dim": 128,
        "ffn_dim": ffn_dim,
        "latent_channels": 16,
        "patch": [1, 2, 2],
        "vae_temporal": 4,
        "vae_spatial": 8,
    }
    assert (config.cluster.nodes, config.cluster.ranks_per_node) == (4, 8)
    assert "model.shape" in refusal("mode=plan", "model=wan")


@pytest.mark.parametrize(
    "path",
    [
        "my file (1).txt",
        "a,b=c.txt",
        "2024",
        "007",
        "1e3",
        "true",
        "[x]",
        "{a: b}",
        "it's",
        'a "b" c',
        "c:\\d\\",
        "é",
    ],
)
def test_paths_need_no_quotes(path: str) -> None:
    config = loaded(f"prompts={path}", f"output.dir={path}", f"model.path={path}")
    assert (config.prompts, config.output.dir, config.model.path) == (path, path, path)


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_characters="$~\\'\"", exclude_categories=("C", "Z")), min_size=1, max_size=20))
def test_any_printable_path_is_taken_as_it_is(path: str) -> None:
    if path != "null":
        assert loaded(f"prompts={path}").prompts == path


def test_a_path_may_be_quoted_refer_and_start_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    config = loaded("prompts='my file.txt'", "output.dir=${oc.env:SCRATCH}/out", "model.path=~/model")
    assert (config.prompts, config.output.dir, config.model.path) == (
        "my file.txt",
        "/scratch/me/out",
        "/home/me/model",
    )


def test_flags_and_overrides_may_be_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    assert load(["sampling.steps=3", "--cfg", "job", "sampling.seed=5"]) is None
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.sampling.steps, printed.sampling.seed) == (3, 5)


REFUSED: dict[str, tuple[Any, ...]] = {  # arguments, and what the line must hold
    "unknown key": (["steps=20"], "steps: unknown key", "did you mean sampling.steps?"),
    "misspelt key": (["sampling.stepz=3"], "sampling.stepz: unknown key", "did you mean sampling.steps?"),
    "added key": (["+sampling.more=3"], "sampling.more: unknown key"),
    "removed group": (["~model"], "model.dtype=null: must be float32, bfloat16 or float16"),
    "removed key": (["~transport.timeout_s"], "transport.timeout_s=null: must be a number, more than 0"),
    "unknown option": (
        ["model=foo"],
        "model=foo",
        "cogvideox, demo, demo-image, flux, hunyuanvideo, hunyuanvideo15, ltx, mochi, qwenimage, wan, wan2.1-1.3b",
    ),
    "option for key": (["parallel=torus"], "did you mean parallel.method=torus?"),
    "group for key": (["sampling=5"], "'sampling=5'", "sampling.num_frames"),
    "part for key": (["trace=2"], "trace.level"),
    "text for number": (["sampling.steps=abc"], "sampling.steps='abc': must be an integer, 1 to 1000"),
    "fraction for integer": (["sampling.num_frames=1.5"], "sampling.num_frames=1.5: must be an integer"),
    "flag for integer": (["sampling.fps=true"], "sampling.fps=true: must be an integer, 1 to 240"),
    "no frames": (["sampling.num_frames=0"], "sampling.num_frames=0"),
    "a scheduler of no name": (
        ["sampling.scheduler=Uni.PC"],
        "sampling.scheduler='Uni.PC': must be the name of a scheduler's class in diffusers, or null",
    ),
    "no steps": (["sampling.steps=0"], "sampling.steps=0"),
    "no pixels": (["sampling.height=0"], "sampling.height=0"),
    "negative width": (["sampling.width=-16"], "sampling.width=-16"),
    "huge number": ([f"sampling.num_frames={10**30}"], "must be an integer, 1 to 100000"),
    "negative guidance": (
        ["sampling.guidance_scale=-1"],
        "sampling.guidance_scale=-1: must be a number, 0 or more",
    ),
    "not a number": (["sampling.guidance_scale=nan"], "sampling.guidance_scale=nan: must be a number"),
    "infinite": (["sampling.guidance_scale=inf"], "sampling.guidance_scale=inf"),
    "negative seed": (["sampling.seed=-1"], "sampling.seed=-1"),
    "seed past 63 bits": ([f"sampling.seed={2**63}"], "0 to 9223372036854775807"),
    "too fast": (["sampling.fps=241"], "sampling.fps=241"),
    "unknown method": (["parallel.method=usps"], "auto, torus, tas, usp, ulysses or ring"),
    "no ranks": (["parallel.ulysses=0"], "parallel.ulysses=0: must be an integer, 1 or more"),
    "three halves": (["parallel.cfg=3"], "parallel.cfg=3", "1 to 2"),
    "no replica": (["parallel.replicas=0"], "parallel.replicas=0", "1 or more"),
    "no video": (["parallel.batch=0"], "parallel.batch=0", "1 to"),
    "two stages": (["parallel.pipeline=2"], "parallel.pipeline=2", "not supported yet"),
    "unknown dtype": (["model.dtype=float64"], "model.dtype='float64': must be float32, bfloat16 or float16"),
    "unknown kind": (["transport.kind=tcp"], "auto, mpi or nvshmem"),
    "unknown inter": (["transport.inter=get"], "auto, rma or persistent"),
    "half a share": (["queue.share=3"], "queue.share='3': must be i/n"),
    "no share": (["queue.share=0/0"], "queue.share='0/0': must be i/n"),
    "beyond the last share": (["queue.share=9/8"], "queue.share='9/8': must be i/n"),
    "a share of nothing": (["queue.share=-1/8"], "queue.share='-1/8': must be i/n"),
    "void at once": (["queue.stale_s=0"], "queue.stale_s=0: must be a number, more than 0"),
    "no time": (["transport.timeout_s=0"], "transport.timeout_s=0: must be a number, more than 0"),
    "endless time": (["transport.timeout_s=inf"], "transport.timeout_s=inf"),
    "no node": (["cluster.nodes=0"], "cluster.nodes=0"),
    "unknown preset": (["cluster=8x8-h100"], "cluster=8x8-h100", "4x8-a100, 4x8-h100, default, ethernet, one-node"),
    "no bandwidth": (["cluster.costs.inter_gb_s=0"], "cluster.costs.inter_gb_s=0: must be a number, more than 0"),
    "no lanes": (["cluster.costs.lanes=1.5"], "cluster.costs.lanes=1.5: must be an integer", "null (measured)"),
    "misspelt cost": (["cluster.costs.inter_gbs=1"], "did you mean cluster.costs.inter_gb_s?"),
    "negative pieces": (["parallel.pieces=-1"], "parallel.pieces=-1: must be an integer, 0 to"),
    "no groups": (["parallel.groups=0"], "parallel.groups=0: must be an integer, 1 to"),
    "no videos": (["plan.videos=0"], "plan.videos=0: must be an integer, 1 to"),
    "no ranks a node": (
        ["cluster.ranks_per_node=0"],
        "cluster.ranks_per_node=0: must be an integer, 1 or more",
    ),
    "unknown compression": (["output.compression=zip"], "gzip, lzf, zstd, blosc2-zstd or none"),
    "unknown video": (["output.video=gif"], "none or mp4"),
    "trace too deep": (["trace.level=3"], "trace.level=3: must be an integer, 0 to 2"),
    "maybe": (["resume=maybe"], "resume='maybe': must be true or false"),
    "unknown mode": (["mode=train"], "mode='train': must be render, plan or report"),
    "empty path": (["prompts="], "prompts=''", ".jsonl"),
    "empty folder": (["output.dir="], "output.dir=''"),
    "control characters": (["prompts=a\nb\x1b[31m"], "prompts='a\\nb\\x1b[31m'"),
    "name with slash": (["model.name=../x"], "model.name='../x'"),
    "unknown reference": (["output.dir=${nope}"], "output.dir: ", "'nope'"),
    "no value": (["prompts"], "'prompts': not understood, write key=value"),
    "no key": (["=3"], "=3: unknown key"),
    "nothing": ([""], "'': not understood"),
    "open bracket": (["parallel.method=[a"], "'parallel.method=[a': not understood"),
    "line break": (["sampling.steps=5\n6"], "'sampling.steps=5\\n6': not understood"),
    "several values": (["sampling.steps=5,6"], "'sampling.steps=5,6'", "not supported"),
    "multirun": (["--multirun", "sampling.steps=5,6"], "--multirun: not supported", "array job"),
    "short multirun": (["-m"], "--multirun: not supported"),
    "multirun mode": (["hydra.mode=MULTIRUN"], "hydra.mode"),
    "pickle": (["--experimental-rerun=x"], "not supported"),
    "unknown flag": (["--steps=3"], "--steps=3", "--help"),
    "flag without value": (["--cfg"], "--cfg", "--help"),
    "flag with other value": (["--cfg", "jobs"], "'jobs'", "'job'"),
    "missing folder": (["--config-dir", "nowhere"], "nowhere"),
    "hydra's own": (["hydra.run.dr=3"], "hydra.run.dr"),
    "long value": ([f"model.dtype={LONG}"], "model.dtype='xxx", "(10002 characters)", "float32"),
    "long key": ([f"{LONG}=1"], "xxx", "(10000 characters): unknown key"),
    "long option": ([f"model={LONG}"], "'model=xxx", "no such option"),
    "long flag": ([f"--{LONG}"], "--xxx"),
    "long nonsense": ([f"sampling.steps='{LONG}"], "not understood"),
}


def test_a_working_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    code = (
        "import os; from hpcdit.config import load; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')\n"
        "try: load([])\nexcept Exception as error: print(repr(error))"
    )
    root = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
        capture_output=True,
    )
    assert ended.stdout.startswith("InputError('the folder that this was started in is gone"), ended.stderr


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_that_names_it(case: str, empty_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv, *parts = REFUSED[case]
    line = refusal(*argv)
    for part in parts:
        assert part in line
    assert line.isprintable()
    assert len(line) < 400
    assert capfd.readouterr() == ("", "")
    assert list(empty_folder.iterdir()) == []


def test_a_configuration_file_of_the_user_s_is_checked_like_ours(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / "cluster" / f"{name}.yaml").write_text(text)

    (tmp_path / "cluster").mkdir()
    write("short", "ranks_per_node: 4\n")
    write("misspelt", "ranks_a_node: 4\n")
    write("broken", "ranks_per_node: [\n")
    use = ("--config-dir", str(tmp_path))
    cluster = loaded(*use, "cluster=short").cluster
    assert (cluster.nodes, cluster.ranks_per_node) == (None, 4)
    assert "cluster.ranks_a_node: unknown key" in refusal(*use, "cluster=misspelt")
    assert "broken.yaml" in refusal(*use, "cluster=broken")


@pytest.mark.parametrize("preset", [f.stem for f in (conf_dir() / "cluster").glob("*.yaml") if f.stem != "default"])
def test_a_preset_says_all_of_a_cluster_and_any_of_it_can_be_said_otherwise(preset: str) -> None:
    spec = loaded("mode=plan", f"cluster={preset}").cluster
    assert None not in (spec.nodes, spec.ranks_per_node, *spec.costs.values())
    assert set(spec.costs) == set(UNITS)
    other = loaded("mode=plan", f"cluster={preset}", "cluster.costs.inter_gb_s=12.5", "cluster.nodes=7").cluster
    assert other == replace(spec, nodes=7, costs={**spec.costs, "inter_gb_s": 12.5})


def test_costs_that_nobody_gave_are_those_of_a_preset_that_is_named() -> None:
    costs, whose = planned_costs(loaded("mode=plan"))
    assert costs == loaded("cluster=4x8-h100").cluster.costs and "4x8-h100" in whose
    costs, whose = planned_costs(loaded("mode=plan", "cluster.costs.lanes=7"))
    assert costs == {**loaded("cluster=4x8-h100").cluster.costs, "lanes": 7}
    assert "lanes" not in whose and "inter_gb_s" in whose
    assert planned_costs(loaded("cluster=ethernet")) == (loaded("cluster=ethernet").cluster.costs, "as given")


def test_help_names_every_key_and_the_groups(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    assert load(["--help"]) is None
    text = capsys.readouterr().out
    missing = [key for key in RULES if not key.startswith(("model.sampling.", "model.shape.")) and key not in text]
    assert missing == []
    described = {words[0]: line for line in text.splitlines() if (words := line.split())}
    short = {key: rule.choices for key, rule in RULES.items() if key in described and "true" not in rule.choices}
    assert [(key, word) for key, words in short.items() for word in words if word not in described[key]] == []
    assert "model: cogvideox, demo, demo-image, flux, hunyuanvideo, hunyuanvideo15, ltx, mochi, qwenimage, wan" in text
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--info", "defaults"], ["--hydra-help"], ["--version"]])
def test_what_only_prints_starts_no_run(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert load(flags) is None
    assert capsys.readouterr().out != ""


def test_the_comments_of_the_configuration_files_name_every_choice() -> None:
    for file in conf_dir().rglob("*.yaml"):
        text = file.read_text()
        assert text.startswith("#"), f"{file} says what it is for"
        for key, rule in RULES.items():
            group, _, leaf = key.rpartition(".")
            if rule.choices and file.parent.name == group and f"\n{leaf}:" in text:
                before = text.partition(f"\n{leaf}:")[0].rpartition("\n\n")[2]
                assert [word for word in rule.choices if word not in before] == [], f"{file}: {key}"


def test_every_file_of_a_model_says_what_each_key_takes() -> None:
    files = [file for file in (conf_dir() / "model").glob("*.yaml") if "defaults:" not in file.read_text()]
    keys = {file.stem: sorted(OmegaConf.load(file)) for file in files}
    assert len(keys) > 5 and all(found == keys["demo"] for found in keys.values()), keys


def test_a_configuration_survives_json() -> None:
    config = loaded("mode=plan", "model=wan2.1-14b", "sampling.steps=3")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_description_has_the_keys_of_the_command_line() -> None:
    described = json.loads(json.dumps(loaded("sampling.steps=3").describe()))
    assert described["sampling.steps"] == 3
    assert described["parallel.method"] == "auto"
    assert described["output.dir"] == "outputs/demo"


def test_the_process_is_left_as_it_was() -> None:
    before = (list(sys.argv), dict(os.environ), os.getcwd())
    load(["sampling.steps=3"])
    refusal("sampling.steps=0")
    assert (sys.argv, dict(os.environ), os.getcwd()) == before


def test_bad_input_is_found_without_heavy_imports() -> None:
    code = (
        "import sys; from hpcdit.config import load; load(['sampling.steps=3']);"
        " print(sorted({'torch', 'numpy', 'diffusers', 'transformers', 'mpi4py'} & set(sys.modules)))"
    )
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, text=True, capture_output=True
    )
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr

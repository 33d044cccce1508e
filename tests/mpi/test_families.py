"""Every model family renders what diffusers' own pipeline renders on one process, on any number of ranks."""

import json
import shutil
from pathlib import Path

import diffusers
import h5py
import numpy as np
import pytest
import torch

from hpcdit.config import load, resolve_sampling
from hpcdit.errors import InputError
from hpcdit.models.families import families
from hpcdit.models.loading import ModelShape, inspect, shape
from hpcdit.models.pipeline import PipelineAdapter
from tests.checkpoints import edit, refusal
from tests.families import EXAMPLES, PROMPTS, Example, picture, pipeline_of
from tests.mpi.families import LAYOUTS, NEAR, PROGRAM, scheduler_of
from tests.mpi.starts import mpirun
from tests.unit.test_wan import Group, Member


def levels(example: Example, checkpoint: Path, scheduler: str = "") -> np.ndarray:
    """Those of both videos, of diffusers' own pipeline; they are also written beside the checkpoint."""
    both = np.stack([example.reference(checkpoint, *prompt, scheduler) for prompt in PROMPTS])
    assert both.std() > 5 and abs(both[0].astype(int) - both[1]).max() > 5, f"{checkpoint}: nothing to compare"
    np.save(checkpoint.with_name(",".join(filter(None, (checkpoint.name, scheduler))) + ".npy"), both)
    return both.astype(int)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family a checkpoint, and the levels of its videos."""
    folder = tmp_path_factory.mktemp("families")
    for name, example in EXAMPLES.items():
        example.make(folder / name)
        assert inspect(folder / name).pipeline == pipeline_of(name)
        own = levels(example, folder / name)
        for scheduler in example.schedulers:
            other = levels(example, folder / name, scheduler)
            assert abs(other - own).max() > 1, f"{name}, {scheduler}: the same video"
    return folder


def test_frames_equal_diffusers_by_every_method_on_one_to_four_ranks_in_batches(checkpoints: Path) -> None:
    found = mpirun(4, "frames", str(checkpoints), module="tests.mpi.families")
    assert sorted(found) == list("1234")
    others = {f"{name},{other}" for name, example in EXAMPLES.items() for other in example.schedulers}
    for size, every in found.items():
        assert set(every) == set(EXAMPLES) | (others if int(size) < 3 else set())
        for name, (count, worst, apart) in every.items():
            assert count == (1 if name in others else len(LAYOUTS[int(size)]))
            assert worst <= 1 and apart < NEAR, f"{name} on {size} ranks: {worst} levels, latents {apart:.2g} apart"


def test_the_program_renders_them_each_half_of_guidance_on_a_rank(checkpoints: Path) -> None:
    assert mpirun(2, "program", str(checkpoints), module="tests.mpi.families") == dict.fromkeys(PROGRAM, 0)
    for name in PROGRAM:
        example = EXAMPLES[name]
        other = scheduler_of(name)
        expected = np.load(checkpoints / f"{name}{',' * bool(other)}{other}.npy").astype(int)
        own = inspect(checkpoints / name).scheduler
        for (_, _, seed), levels in zip(PROMPTS, expected, strict=True):
            with h5py.File(checkpoints / f"{name}-out" / "videos" / f"{seed}.h5") as file:
                assert abs(file["frames"][:].astype(int) - levels).max() <= 1, f"{name}, {seed}"
                assert json.loads(file.attrs["sampling"])["scheduler"] == (other or own)
                swapped = b"exchange cfg" in set(file["trace/events"]["name"])
            assert swapped == example.guided, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_checkpoint_that_is_not_whole_or_of_another_kind_is_refused(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(checkpoints / name, tmp_path / name)
    whole = inspect(folder)
    assert whole.family in name and set(whole.weights) <= set(whole.parts)
    for part in whole.weights:
        config = folder / part / "config.json"
        before = config.read_text()
        if part.startswith(("transformer", "vae")):
            edit(config, _class_name="AutoencoderDC")
            assert refusal(folder).startswith(f"{part}/config.json: _class_name: 'AutoencoderDC' is not supported")
        config.unlink()
        assert refusal(folder).startswith(f"{part}/config.json: no such file")
        config.write_text(before)
        (file,) = (folder / part).glob("*.safetensors")
        data = file.read_bytes()
        file.unlink()
        assert "no such file; the checkpoint is not complete" in refusal(folder)
        file.write_bytes(data[:-1])
        assert "the copy is not complete" in refusal(folder)
        file.write_bytes(data)
    edit(folder / "transformer/config.json", num_layers=whole.transformer["num_layers"] + 1)
    said = refusal(folder)
    assert ("as of the first transformer" if "transformer_2" in whole.parts else "is missing; config.json asks") in said
    edit(folder / "model_index.json", _class_name="SanaVideoPipeline")
    said = refusal(folder)
    assert all(pipeline in said for family in families().values() for pipeline in family.pipelines)


@pytest.mark.parametrize(
    ("name", "part", "key", "value", "allowed"),
    [
        ("mochi", "vae", "temporal_expansions", [1, 2, 2], "[1, 2, 3], as the pipeline takes them to be"),
        ("mochi", "vae", "latents_mean", [0.0], "null or 12 numbers"),
        ("mochi", "transformer", "text_embed_dim", 12, "16, the text encoder's d_model"),
        ("hunyuanvideo15", "transformer", "text_embed_2_dim", 12, "14, of text_encoder_2"),
        ("hunyuanvideo15-image", "transformer", "image_embed_dim", 12, "6, of image_encoder"),
        ("hunyuanvideo15", "transformer", "use_meanflow", True, "false (text to video)"),
        ("cogvideox-image", "transformer", "in_channels", 4, "8, of the VAE's 4 latent_channels"),
        ("cogvideox-image", "transformer", "use_rotary_positional_embeddings", False, "true, as in 5B and 1.5"),
        ("cogvideox15", "transformer", "patch_size_t", 3, "null or 2"),
        ("cogvideox15", "transformer", "ofs_embed_dim", 512, "null (text to video)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    checkpoints: Path, tmp_path: Path, name: str, part: str, key: str, value: object, allowed: str
) -> None:
    folder = shutil.copytree(checkpoints / name, tmp_path / name)
    edit(folder / part / "config.json", **{key: value})
    assert refusal(folder) == f"{part}/config.json: {key}: {value} is not supported; allowed: {allowed}"


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if not example.images])
def test_videos_of_a_legal_length_come_out_that_long(checkpoints: Path, name: str) -> None:
    """The nearest three numbers of frames to that of the example, decoded; in their own few rows and columns."""
    adapter, (frames, *sides) = PipelineAdapter.load(inspect(checkpoints / name)), EXAMPLES[name].size
    legal = [n for n in range(1, frames + 9) if not illegal(adapter.shape, n, *sides)]
    assert frames in legal
    for count in legal[-3:]:
        latents = torch.zeros(1, *adapter.shape.latents(count, *sides))
        assert len(adapter.decode(latents)) == count


def illegal(of: ModelShape, num_frames: int, height: int, width: int) -> bool:
    try:
        of.legal(num_frames, height, width)
    except InputError:
        return True
    return False


def test_a_guider_that_leaves_steps_unguided_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints / "hunyuanvideo15", tmp_path / "model")
    edit(folder / "guider" / "guider_config.json", start=0.2)
    assert refusal(folder) == "guider/guider_config.json: start: 0.2 is not supported; allowed: 0.0"


def test_a_picture_is_encoded_whatever_type_the_model_computes_in(checkpoints: Path) -> None:
    """The VAE stays in float32, though CogVideoX's pipeline gives it pictures in the model's type."""
    name = "cogvideox-image"
    example, adapter = EXAMPLES[name], PipelineAdapter.load(inspect(checkpoints / name), "bfloat16")
    conditions = adapter.encode("a cat", "", True, example.length, str(picture(checkpoints / name)))
    noise, alone = adapter.noise(3, *example.size), Member(Group(adapter.shape.length(*example.size, 23)), 0)
    latents = adapter.denoise(conditions, noise, 1, 4.0, alone, lambda *_: None, seeds=(3,))
    assert latents.isfinite().all() and latents.std() > 0.1


def test_a_picture_is_cut_to_the_video_s_size_where_the_pipeline_takes_that_from_the_picture(
    checkpoints: Path, tmp_path: Path
) -> None:
    """The pipeline is given the upright middle of the picture, which has the size that is asked for here."""
    name, size, (prompt, negative, seed) = "hunyuanvideo15-image", (5, 48, 32), PROMPTS[0]
    example, adapter = EXAMPLES[name], PipelineAdapter.load(inspect(checkpoints / name))
    part, whole = tmp_path / "upright.png", picture(checkpoints / name)
    processor = diffusers.image_processor.VaeImageProcessor()
    processor.resize(diffusers.utils.load_image(str(whole)), *size[1:], resize_mode="crop").save(part)
    expected = example.reference(checkpoints / name, prompt, negative, seed, start=part).astype(int)
    conditions = adapter.encode(prompt, negative, True, example.length, str(whole))
    alone = Member(Group(adapter.shape.length(*size, example.length)), 0)
    settings = example.steps, example.scale, alone, lambda *_: None
    found = adapter.decode(adapter.denoise(conditions, adapter.noise(seed, *size), *settings, seeds=(seed,)))
    assert found.shape == expected.shape == (5, 48, 32, 3) and abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_all_layers_are_compiled_where_a_gpu_is_to_run_them(checkpoints: Path, name: str) -> None:
    """What is compiled is told by torch alone; nothing is run."""
    folder = inspect(checkpoints / name)
    transformer = getattr(diffusers, folder.transformer["_class_name"]).from_config(folder.transformer)
    families()[folder.family].compile(transformer)
    compiled = [module for module in transformer.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == shape(folder).layers


ONE_OF_EACH = sorted({"cogvideox-5b", "wan-fine", *families()} - {"cogvideox", "wan"})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_fewest_steps_that_are_allowed_make_a_video(checkpoints: Path, name: str) -> None:
    example, adapter = EXAMPLES[name], PipelineAdapter.load(inspect(checkpoints / name))
    (prompt, negative, seed), of = PROMPTS[0], adapter.shape
    conditions = adapter.encode(prompt, negative, adapter.guided(example.scale), example.length)
    alone = Member(Group(of.length(*example.size, example.length)), 0)
    settings = of.least_steps, example.scale, alone, lambda *_: None
    assert adapter.denoise(conditions, adapter.noise(seed, *example.size), *settings, seeds=(seed,)).isfinite().all()
    with pytest.raises(InputError, match=f"^steps: {of.least_steps - 1}; allowed: {of.least_steps} or more"):
        of.legal(*example.size, steps=of.least_steps - 1)


@pytest.mark.parametrize("name", sorted({*ONE_OF_EACH} - {"wan-fine"}))
def test_layers_with_shared_attention_are_compiled_whole(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What torch.compile is given holds the attention of all ranks as one operator; only tokens are counted apart."""
    example, adapter = EXAMPLES[name], PipelineAdapter.load(inspect(checkpoints / name))
    (prompt, negative, seed), of = PROMPTS[0], adapter.shape
    conditions = adapter.encode(prompt, negative, adapter.guided(example.scale), example.length)
    noise, length = adapter.noise(seed, *example.size), of.length(*example.size, example.length)

    def denoised() -> torch.Tensor:
        settings = example.steps, example.scale, Member(Group(length), 0), lambda *_: None
        return adapter.denoise(conditions, noise, *settings, seeds=(seed,))

    wanted, compiled = denoised(), torch.nn.Module.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "compile", lambda layer, **kw: compiled(layer, backend="eager", **kw))
        families()[inspect(checkpoints / name).family].compile(adapter._pipe.transformer)
    assert abs(denoised() - wanted).max() < NEAR
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 2 and counters["graph_break"].total() == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted(families()))
def test_a_family_has_defaults_that_its_models_can_make(checkpoints: Path, name: str) -> None:
    """Of the sizes of real models, whose VAEs are as many levels deep as those of the examples, or deeper."""
    example = next(example for example in EXAMPLES if example.startswith(name))
    config = load([f"model.path={checkpoints / example}"])
    assert config is not None
    sampling, of = resolve_sampling(config, name), shape(inspect(checkpoints / example))
    of.legal(sampling.num_frames, sampling.height, sampling.width)
    assert of.images == (sampling.num_frames == 1)

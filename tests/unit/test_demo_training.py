"""The demo model's training program, at sizes that a CPU trains in seconds."""

import csv
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import multiprocessing

from hpcdit.models.loading import inspect, shape
from tests.asked import Asked
from tools.demo_model import export, latents, models, stages, train, whole
from tools.demo_model.captions import held_out, parse
from tools.demo_model.ranks import Ranks
from tools.demo_model.settings import Settings, settings

pytestmark = pytest.mark.usefixtures("one_thread")


RESIDUAL = dict(base_dim=6, is_residual=True, in_channels=12, out_channels=12, patch_size=2, dim_mult=[1, 2, 2],
                temperal_downsample=[True, True])  # fmt: skip
PLAIN = dict(base_dim=6, dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True])


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("form", [RESIDUAL, PLAIN], ids=["2.2", "2.1"])
def test_whole_clips_give_what_the_vae_gives_chunk_by_chunk(form: dict[str, Any], frames: int) -> None:
    torch.manual_seed(0)
    numbers = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    # In float64: how far float32's rounding takes them apart depends on the processor.
    theirs: Any = AutoencoderKLWan(**form, z_dim=4, num_res_blocks=1, **numbers).double()
    ours: Any = AutoencoderKLWan(**form, z_dim=4, num_res_blocks=1, **numbers).double()
    ours.load_state_dict(theirs.state_dict())
    whole.whole(ours)
    clips = torch.rand(2, 3, frames, 16, 24).double() * 2 - 1

    wanted = theirs.encode(clips).latent_dist
    mean, log_variance = whole.encode(ours, clips)
    assert torch.allclose(mean, wanted.mean, atol=1e-12) and torch.allclose(log_variance, wanted.logvar, atol=1e-12)
    picture = whole.decode(ours, mean).clamp(-1, 1)  # theirs is clamped
    assert torch.allclose(picture, theirs.decode(wanted.mean).sample, atol=1e-12)

    target = torch.rand_like(clips)
    (picture - target).square().sum().backward()
    (theirs.decode(wanted.mean).sample - target).square().sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.named_parameters():
        if gradients[name] is None:  # of the convolutions over time, where there is one frame
            assert weight.grad is None and "time_conv" in name
        else:
            scale = float(gradients[name].abs().max())
            assert torch.allclose(weight.grad, gradients[name], rtol=0, atol=1e-9 * scale + 1e-12), name


CONF = Path(train.__file__).resolve().parent / "conf"
TINY = {
    "device": "cpu", "every": 2, "reserve_s": 0,
    "sizes": {"picture": [1, 32, 32], "usual": [5, 32, 32], "wide": [5, 32, 48]},
    "vae": {**RESIDUAL, "z_dim": 4, "num_res_blocks": 1, "scale_factor_temporal": 4, "scale_factor_spatial": 8},
    "transformer": {"patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
                    "ffn_dim": 16, "freq_dim": 16, "cross_attn_norm": True, "rope_max_seq_len": 16},
    "text_encoder": {"d_model": 12, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2},
    "bank": {"clips": 6, "steps": 2},
    "evaluation": {"one": 2, "two": 0, "images": 1, "batch": 2, "steps": 1, "guidance_scale": 4.0,
                   "max_sequence_length": 20},
}  # fmt: skip
BOTH = {"usual": 0.5, "wide": 0.5}
SIZES = {"vae_pictures": {"picture": 1.0}, "vae_clips": BOTH, "text": BOTH, "text_long": BOTH, "image": BOTH}


def tiny(out: Path, steps: int = 6, **changes: Any) -> Settings:
    """The shipped configuration with sizes that a CPU trains in seconds."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train")
    OmegaConf.set_struct(config, False)
    made: Any = OmegaConf.to_container(config)
    made |= {**TINY, "out": str(out), **changes}
    for name, sizes in SIZES.items():
        made["stages"][name] |= {"sizes": sizes, "steps": steps, "batch": 3, "warmup": 2, "two": 0.0}
    return settings(made)


def trained(made: Settings) -> bool:
    made.folder.mkdir(exist_ok=True)
    return train.train(made, time.monotonic() + 1000, Ranks())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """All stages of a tiny model, trained in one call."""
    torch.set_num_threads(1)
    made = tiny(tmp_path_factory.mktemp("run") / "whole")
    assert trained(made)
    return made


def test_a_call_that_was_cut_off_goes_on_to_the_same_bits(
    run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny(tmp_path / "pieces", save_s=1e-9)
    real, calls = train.Training.step, 0

    def cut(training: train.Training, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:  # three steps a call, in the middle of a bank and of an average
            raise KeyboardInterrupt
        real(training, loss)

    monkeypatch.setattr(train.Training, "step", cut)
    cuts = 0
    while True:
        try:
            assert trained(made)
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts >= 2 * len(made.stages) - 1
    for name in made.stages:
        wanted, found = (load_file(settings.folder / f"{name}.safetensors") for settings in (run, made))
        assert wanted.keys() == found.keys() and int(found["steps"]) == 6
        for key in wanted:
            assert key == "seconds" or torch.equal(wanted[key], found[key]), (name, key)


def one_of_two(rank: int, made: Settings, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = Ranks()
    ranks.join(torch.device("cpu"))
    assert train.train(made, time.monotonic() + 1000, ranks)
    ranks.leave()


def test_two_ranks_learn_what_one_does(run: Settings, tmp_path: Path) -> None:
    made = tiny(tmp_path / "two")
    made.folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    multiprocessing.start_processes(one_of_two, (made, port), nprocs=2, start_method="fork")

    alone, both = (list(csv.DictReader((of.folder / "curve.csv").open())) for of in (run, made))
    losses = [[(row["stage"], row["step"], float(row["value"])) for row in of if row["name"] == "loss"]
              for of in (alone, both)]  # fmt: skip
    assert len(losses[0]) == 15 and [row[:2] for row in losses[0]] == [row[:2] for row in losses[1]]
    assert [row[2] for row in losses[1]] == pytest.approx([row[2] for row in losses[0]], rel=2e-3)
    for name in made.stages:
        wanted, found = (load_file(of.folder / f"{name}.safetensors") for of in (run, made))
        far = [key for key in wanted if key.startswith("average/") and (wanted[key] - found[key]).abs().mean() > 1e-4]
        assert not far, (name, far)


def test_what_is_done_is_not_done_again_and_nothing_starts_without_time(run: Settings, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    assert train.train(run, time.monotonic() + 100, Ranks())
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before
    late = tiny(tmp_path)
    assert not train.train(late, time.monotonic() - 1, Ranks())
    assert list(tmp_path.glob("*.safetensors")) == []


def test_stages_begin_with_what_the_one_before_learned_and_learn(run: Settings) -> None:
    clips, pictures = (load_file(run.folder / f"{name}.safetensors") for name in ("vae_clips", "vae_pictures"))
    weights = [key for key in clips if key.startswith("average/") and "encoder.conv_in.weight" in key]
    near = (clips[weights[0]] - pictures[weights[0]]).abs().mean()
    assert 0 < float(near) < 0.1 * float(pictures[weights[0]].abs().mean())
    text, image = (load_file(run.folder / f"{name}.safetensors") for name in ("text_long", "image"))
    frozen = [key for key in text if key.startswith("average/text_encoder.")]
    assert frozen and all(torch.equal(text[key], image[key]) for key in frozen)
    moved = [key for key in text if key.startswith("average/transformer.blocks") and key.endswith("weight")]
    assert moved and not any(torch.equal(text[key], image[key]) for key in moved)


def test_the_curve_has_losses_rates_and_figures(run: Settings) -> None:
    with (run.folder / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {stage: {row["name"] for row in rows if row["stage"] == stage} for stage in run.stages}
    assert kinds["vae_clips"] == {"loss", "lr", "psnr", "psnr_worst"}
    assert {"1.shape", "1.all", "bfloat16.1.all"} <= kinds["text"]
    assert {"all", "first_frame_psnr"} <= kinds["image"]
    rates = [float(row["value"]) for row in rows if row["stage"] == "text" and row["name"] == "lr"]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(1e-5)


def test_the_vae_learns(tmp_path: Path) -> None:
    made = tiny(tmp_path, steps=60)
    made.stages["vae_pictures"].lr = made.stages["vae_pictures"].lr_end = 1e-2
    job = stages.work(made, "vae_pictures", Ranks())
    training = train.Training(job.modules, job.stage, job.device, Ranks())
    first = job.loss(0).item()  # the same clips each time
    for step in range(40):
        training.step(job.loss(step))
    assert job.loss(0).item() < 0.6 * first


def test_the_exported_folders_are_what_hpcdit_and_diffusers_load(run: Settings, tmp_path: Path) -> None:
    export.export(run, tmp_path / "text", "text")
    folder = inspect(tmp_path / "text")
    assert folder.vae["latents_std"] == pytest.approx(load_file(run.folder / "latents.safetensors")["std"].tolist())
    assert {
        value.dtype
        for value in load_file(tmp_path / "text" / "transformer" / "diffusion_pytorch_model.safetensors").values()
    } == {torch.float16}
    text = (tmp_path / "text" / "README.md").read_text()
    assert "| text | text | 6 of 6 | 3 | 0.0012 to 1e-05 | 5x32x32, 5x32x48 |" in text and "Seed 7." in text
    assert "- vae_clips: psnr " in text and "image" not in text.split("Figures")[1]

    export.export(run, tmp_path / "image", "image")
    twin = inspect(tmp_path / "image")
    assert twin.pipeline == "WanImageToVideoPipeline" and shape(twin).image and not shape(folder).image
    pipe: Any = WanImageToVideoPipeline.from_pretrained(tmp_path / "image")
    assert pipe.image_encoder is None and pipe.transformer.config.in_channels == 2 * 4 + 4
    assert json.loads((tmp_path / "image" / "transformer" / "config.json").read_text())["out_channels"] == 4


def test_what_the_image_model_learned_with_is_what_its_pipeline_gives_it() -> None:
    """The mask and the first frame's latents, as WanImageToVideoPipeline.prepare_latents makes them."""
    made = tiny(Path("unused"))
    torch.manual_seed(0)
    vae = models.vae(made)
    pipe = models.pipeline(vae, models.transformer(made, image=True), models.text_encoder(made))
    clips = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    wanted = [
        pipe.prepare_latents(clip[None, :, 0], 1, 4, 32, 48, 9, torch.float32, torch.device("cpu"))[1] for clip in clips
    ]
    same = models.vae(made)
    same.load_state_dict(vae.state_dict())
    mean, _ = whole.encode(whole.whole(same), latents.first_only(clips))
    assert torch.allclose(latents.condition(mean), torch.cat(wanted), atol=2e-6)


@pytest.mark.parametrize("length", [16, 17, 40])
def test_sixteen_slots_stand_for_any_number(length: int) -> None:
    made = tiny(Path("unused"))
    torch.manual_seed(0)
    model = models.transformer(made, image=False)
    x, time_, text = torch.randn(2, 4, 2, 4, 4), torch.tensor([20.0, 700.0]), torch.randn(2, 16, 12)
    text[:, 9:] = 0
    long = torch.cat([text, torch.zeros(2, length - 16, 12)], 1)
    wanted = model(x, time_, long, return_dict=False)[0]
    models.padded(model).pad(torch.tensor([length, length]))
    assert torch.allclose(model(x, time_, text, return_dict=False)[0], wanted, atol=1e-5)
    if length > 17:
        models.padded(model).pad(torch.tensor([16, 16]))
        assert not torch.allclose(model(x, time_, text, return_dict=False)[0], wanted, atol=1e-4)


def test_a_prepared_mask_is_what_the_text_encoder_makes_of_one() -> None:
    made = tiny(Path("unused"))
    torch.manual_seed(0)
    encoder, tokens = models.text_encoder(made), models.tokens(["a red star growing on black", ""])
    wanted = encoder(tokens, tokens != 0).last_hidden_state
    found = encoder(tokens, models.prepared(tokens != 0)).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(encoder(tokens).last_hidden_state, wanted, atol=1e-3)


def test_a_pass_of_the_transformer_asks_the_device_for_nothing(run: Settings) -> None:
    """Else it could not be captured as a graph, and the host could not launch the next while one runs."""
    job: Any = stages.work(run, "text", Ranks())
    _, count, drawn = job._draw(0)
    with Asked() as asked:
        job._loss(count, *drawn).backward()
    assert asked.count == 0


def test_a_model_with_an_image_begins_as_the_one_without() -> None:
    made = tiny(Path("unused"))
    torch.manual_seed(0)
    text, image = models.transformer(made, image=False), models.transformer(made, image=True)
    image.load_state_dict(models.widened(text.state_dict(), image.config.in_channels))
    x, beside, words = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 8, 2, 4, 4), torch.randn(1, 16, 12)
    time_ = torch.tensor([300.0])
    wanted = text(x, time_, words, return_dict=False)[0]
    assert torch.equal(image(torch.cat([x, beside], 1), time_, words, return_dict=False)[0], wanted)


def test_training_sees_no_held_out_scene_and_draws_hard_ones_more_often() -> None:
    scenes = latents.Scenes(0.4, {"star": 2.0, "white": 1.5}, torch.device("cpu"))
    assert not any(held_out(parse(caption)) for caption in scenes.captions[::29])
    drawn = [scenes.captions[i] for i in scenes.draw(4000, torch.Generator().manual_seed(0)).tolist()]
    assert sum(" and " in caption for caption in drawn) / 4000 == pytest.approx(0.4, abs=0.04)
    assert sum("star" in caption for caption in drawn if " and " not in caption) / 2400 == pytest.approx(0.4, abs=0.05)


def test_captions_fit_into_the_slots_and_a_an_is_an_a() -> None:
    rows = models.tokens(
        ["a red circle standing still and a blue square moving up on black", "an orange star growing on grey"]
    )
    assert rows.shape == (2, 16) and int((rows[0] != 0).sum()) == 14
    assert torch.equal(rows[1], models.tokens(["a orange star growing on grey"])[0])
    assert 2 not in rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "tpu"}, "device: allowed: auto, cpu, cuda"),
        ({"minutes": "soon"}, "minutes"),
        ({"speed": 3}, "speed"),
        ({"sizes": {"usual": [6, 32, 32]}}, r"sizes.usual: allowed: \[4 n \+ 1 frames"),
        ({"emphasis": {"cat": 2.0}}, "emphasis.cat: allowed"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        tiny(Path("unused"), **changes)
    assert "\n" not in str(caught.value)

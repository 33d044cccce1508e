"""The Wan adapter against diffusers' own WanPipeline: the same frames, on one rank and on several."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from diffusers.models.activations import GELU

import hpcdit.models
from hpcdit.errors import VideoError
from hpcdit.kernels import cpu
from hpcdit.kernels.base import Counted, Norm, Tables
from hpcdit.models.base import OnStep, Snapshot
from hpcdit.models.compiling import GeluProjection
from hpcdit.models.loading import inspect
from hpcdit.models.pipeline import PipelineAdapter
from hpcdit.transport.base import Traffic
from tests.attention_cases import UNTIMED
from tests.checkpoints import make_wan

DEMO = Path(hpcdit.models.__file__).parent / "demo"
LONG = "a red circle moving left on white " * 12


@dataclass(frozen=True)
class Case:
    prompt: str = "a red circle moving left on white"
    negative_prompt: str = "grey"
    guidance_scale: float = 4.0
    num_frames: int = 9
    height: int = 48
    width: int = 80
    steps: int = 3
    max_sequence_length: int = 24
    seed: int = 7


CASES = {
    "guided": Case(),
    "unguided": Case(guidance_scale=1.0),
    "empty prompt": Case(prompt="", negative_prompt=""),
    "empty prompt, unguided": Case(prompt="", guidance_scale=0.0),
    "prompts beyond the limit": Case(prompt=LONG, negative_prompt=LONG + "red", max_sequence_length=10),
    "one frame": Case(num_frames=1, height=16, width=32, steps=1),
    "one token a prompt": Case(max_sequence_length=1),
}


class Group:
    """Ranks that are threads: they exchange by lists and barriers, and attend with torch's own attention."""

    def __init__(self, *counts: int, exchange: bool = True) -> None:
        self.ranks = [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
        self.exchange = exchange
        self.barrier = threading.Barrier(len(counts), timeout=30)
        self.board: list[torch.Tensor] = [torch.empty(0)] * len(counts)

    def all_tokens(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self.board[rank] = x
        self.barrier.wait()
        whole = torch.cat(self.board, dim=1)
        self.barrier.wait()
        return whole


class Member:
    """One thread's part of a group, as a `hpcdit.models.base.Sequence`."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank, self.shares, self.tokens = group, rank, tuple(group.ranks), group.ranks[rank]
        self.published: dict[str, torch.Tensor] = {}
        self.tensors = "vkq"
        self.spans, self.traffic = UNTIMED, Traffic()
        self.order: list[str] = []

    def publish(self, name: str, x: torch.Tensor, norm: Norm | None = None, tables: Tables | None = None) -> None:
        assert name not in self.published and x.shape[1] == len(self.tokens)
        block = torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format)
        cpu.embed(x, norm, tables, [(range(x.shape[2]), block)])
        self.published[name] = block.transpose(0, 1)
        self.order.append(name)

    def project(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.published[name] = F.linear(x, weight, bias)
        self.order.append(name)

    def attend(self, keys: Counted | None = None) -> torch.Tensor:
        q, k, v = (self.published.pop(name) for name in "qkv")
        v = v.reshape(k.shape)  # what was projected has no heads yet
        if self.group.exchange:
            k, v = (self.group.all_tokens(self.rank, x) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None
        if keys is not None:
            mask = torch.ones(len(q), 1, 1, k.shape[2], dtype=torch.bool)
            for row, at in zip(mask, keys.places([range(k.shape[2])]), strict=True):
                if at is not None:
                    row[...] = False
                    row[..., at] = True
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def attend_whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.all_tokens(self.rank, x)


def alone(adapter: PipelineAdapter, case: Case) -> Member:
    return Member(Group(adapter.shape.tokens(case.num_frames, case.height, case.width)), 0)


def nothing(step: int, snapshot: Callable[[], Snapshot]) -> None:
    pass


def render(
    adapter: PipelineAdapter, case: Case, sequence: Member | None = None, on_step: OnStep = nothing
) -> np.ndarray:
    guided = adapter.guided(case.guidance_scale)
    conditions = adapter.encode(case.prompt, case.negative_prompt, guided, case.max_sequence_length)
    noise = adapter.noise(case.seed, case.num_frames, case.height, case.width)
    sequence = sequence or alone(adapter, case)
    return adapter.decode(adapter.denoise(conditions, noise, case.steps, case.guidance_scale, sequence, on_step))


def render_in_threads(adapters: Sequence[PipelineAdapter], case: Case, group: Group) -> list[np.ndarray]:
    def work(rank: int) -> np.ndarray:
        try:
            return render(adapters[rank], case, Member(group, rank))
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(len(group.ranks)) as pool:
        return list(pool.map(work, range(len(group.ranks))))


@cache
def reference(folder: Path, case: Case, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """What WanPipeline itself renders, as levels."""
    pipe = WanPipeline.from_pretrained(folder, dtype={"default": dtype, "vae": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        prompt=case.prompt,
        negative_prompt=case.negative_prompt,
        num_frames=case.num_frames,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        max_sequence_length=case.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(case.seed),
    ).frames[0]
    return (video * 255).round().astype(np.uint8)


def levels_apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(int) - other).max())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of torch's own would only wait for each other, and for the threads that stand for ranks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def euler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("euler"))


@pytest.fixture(scope="module")
def unipc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan(tmp_path_factory.mktemp("unipc"), scheduler="UniPCMultistepScheduler")


@pytest.fixture(scope="module")
def tiny(euler: Path) -> PipelineAdapter:
    return PipelineAdapter.load(inspect(euler))


@pytest.fixture(scope="module")
def demo() -> PipelineAdapter:
    return PipelineAdapter.load(inspect(DEMO))


@pytest.fixture(scope="module")
def several(unipc: Path) -> list[PipelineAdapter]:
    return [PipelineAdapter.load(inspect(unipc)) for _ in range(3)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_rank_renders_what_the_pipeline_renders(tiny: PipelineAdapter, euler: Path, case: Case) -> None:
    assert levels_apart(render(tiny, case), reference(euler, case)) == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_scheduler_is_the_one_that_the_checkpoint_names(
    several: list[PipelineAdapter], unipc: Path, euler: Path, guidance_scale: float
) -> None:
    case = Case(guidance_scale=guidance_scale, steps=4)
    frames = render(several[0], case)
    assert levels_apart(frames, reference(unipc, case)) == 0
    assert levels_apart(frames, reference(euler, case)) > 1


@pytest.mark.parametrize(
    "case",
    [
        Case(num_frames=17, height=96, width=96, steps=2),
        Case(num_frames=9, prompt="", guidance_scale=1.0),
    ],
    ids=["guided", "empty prompt, unguided"],
)
def test_the_demo_model_renders_what_the_pipeline_renders(demo: PipelineAdapter, case: Case) -> None:
    assert levels_apart(render(demo, case), reference(DEMO, case)) == 0


def test_half_precision_is_the_transformers_alone(euler: Path) -> None:
    frames = render(PipelineAdapter.load(inspect(euler), "bfloat16"), Case())
    assert levels_apart(frames, reference(euler, Case(), torch.bfloat16)) == 0
    assert levels_apart(frames, reference(euler, Case())) > 0


@pytest.mark.parametrize("counts", [(45,), (7, 38), (20, 1, 24)], ids=str)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_every_rank_gets_the_frames_of_one_process(
    several: list[PipelineAdapter], unipc: Path, counts: tuple[int, ...], guidance_scale: float
) -> None:
    case = Case(guidance_scale=guidance_scale)
    for frames in render_in_threads(several, case, Group(*counts)):
        assert levels_apart(frames, reference(unipc, case)) <= 1


def test_without_the_exchange_of_keys_and_values_the_frames_differ(several: list[PipelineAdapter], unipc: Path) -> None:
    for frames in render_in_threads(several, Case(), Group(7, 38, exchange=False)):
        assert levels_apart(frames, reference(unipc, Case())) > 20


@pytest.mark.parametrize("tensors", ["vkq", "qvk"])
def test_tensors_are_published_in_the_order_that_is_asked_for(tiny: PipelineAdapter, tensors: str) -> None:
    case = Case(guidance_scale=1.0, steps=2)
    sequence = alone(tiny, case)
    sequence.tensors = tensors
    render(tiny, case, sequence)
    assert sequence.order == list(tensors) * tiny.shape.layers * case.steps


def test_prompt_size_and_seed_all_show(tiny: PipelineAdapter) -> None:
    frames = render(tiny, Case())
    others = (Case(prompt="a dog"), Case(negative_prompt="a dog"), Case(guidance_scale=2.0), Case(seed=8))
    for other in others:
        assert levels_apart(render(tiny, other), frames) > 1


def test_noise_depends_on_the_seed_alone(tiny: PipelineAdapter) -> None:
    torch.manual_seed(1)
    first = tiny.noise(3, 9, 48, 80)
    torch.manual_seed(2)
    assert first.equal(tiny.noise(3, 9, 48, 80)) and not first.equal(tiny.noise(4, 9, 48, 80))
    assert first.shape == (1, *tiny.shape.latents(9, 48, 80)) and first.dtype == torch.float32


def test_tokens_beyond_the_limit_are_counted(tiny: PipelineAdapter) -> None:
    conditions = tiny.encode("a red circle", "the cat on the sea and the sky", True, 5)  # each with an end mark
    assert (conditions.prompt_cut, conditions.negative_cut) == (0, 4)
    conditions = tiny.encode("  a   red\ncircle ", "", False, 3)
    assert (conditions.prompt_cut, conditions.negative_cut, conditions.negative) == (1, 0, None)


def test_each_step_is_reported_once_at_its_end(tiny: PipelineAdapter) -> None:
    steps: list[int] = []
    render(tiny, Case(steps=4), on_step=lambda step, _: steps.append(step))
    assert steps == [0, 1, 2, 3]


class Stop(Exception):
    pass


def test_a_stop_after_a_step_leaves_the_adapter_fit_for_another_video(
    several: list[PipelineAdapter], unipc: Path
) -> None:
    def stop(step: int, snapshot: Callable[[], Snapshot]) -> None:
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        render(several[0], Case(steps=4), on_step=stop)
    assert levels_apart(render(several[0], Case()), reference(unipc, Case())) == 0


@pytest.mark.parametrize("call", ["publish", "attend", "gather"])
def test_a_failed_exchange_leaves_the_adapter_fit_for_another_video(
    several: list[PipelineAdapter], unipc: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> None:
        raise Stop

    sequence = alone(several[0], Case())
    monkeypatch.setattr(sequence, call, fail)
    with pytest.raises(Stop):
        render(several[0], Case(), sequence)
    assert levels_apart(render(several[0], Case()), reference(unipc, Case())) == 0


def test_one_video_is_decoded_while_another_is_denoised(several: list[PipelineAdapter], unipc: Path) -> None:
    def work(seed: int) -> np.ndarray:
        return several[0].decode(latents[seed])

    case = Case(steps=2)
    conditions = several[0].encode(case.prompt, case.negative_prompt, True, case.max_sequence_length)
    latents: dict[int, torch.Tensor] = {}
    with ThreadPoolExecutor(1) as pool:
        frames = {}
        for seed in (1, 2, 3):
            noise = several[0].noise(seed, case.num_frames, case.height, case.width)
            latents[seed] = several[0].denoise(
                conditions, noise, case.steps, case.guidance_scale, alone(several[0], case), nothing
            )
            frames[seed] = pool.submit(work, seed)
    for seed, future in frames.items():
        assert levels_apart(future.result(), reference(unipc, replace(case, seed=seed))) == 0


def test_a_video_is_decoded_while_the_picture_of_another_is_encoded() -> None:
    twin = PipelineAdapter.load(inspect(DEMO.with_name("demo-image")))
    latents, clip = twin.noise(0, 13, 32, 48), torch.zeros(1, 3, 13, 32, 48)
    wanted = twin.decode(latents)
    # Each chunk of frames is decoded just after a clip was encoded, as another thread may do.
    chunk = twin._pipe.vae.decoder.register_forward_pre_hook(lambda *_: twin._pipe.vae.encode(clip) and None)
    assert np.array_equal(twin.decode(latents), wanted)
    chunk.remove()


def test_a_guidance_scale_of_one_or_less_takes_no_negative_prompt(tiny: PipelineAdapter) -> None:
    assert [tiny.guided(scale) for scale in (0.0, 1.0, 1.01, 5.0)] == [False, False, True, True]


def test_guidance_without_an_encoded_negative_prompt_is_refused(tiny: PipelineAdapter) -> None:
    case = Case()
    conditions = tiny.encode(case.prompt, case.negative_prompt, False, case.max_sequence_length)
    noise = tiny.noise(0, case.num_frames, case.height, case.width)
    with pytest.raises(ValueError, match="guided"):
        tiny.denoise(conditions, noise, 1, 4.0, alone(tiny, case), nothing)


def test_a_fused_gelu_is_its_layer_and_gelu_under_the_same_names() -> None:
    torch.manual_seed(0)
    plain = GELU(6, 10, approximate="tanh").double().requires_grad_(False)
    fused, x = GeluProjection(plain.proj), torch.randn(2, 3, 6, dtype=torch.float64)
    assert set(fused.state_dict()) == set(plain.state_dict())
    assert torch.allclose(fused(x), F.gelu(plain.proj(x)), rtol=0, atol=1e-12)  # on a CPU; tests/gpu has the rest


def test_latents_that_are_not_numbers_make_no_frames(tiny: PipelineAdapter) -> None:
    noise = tiny.noise(0, 9, 48, 80)
    noise[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(VideoError):
        tiny.decode(noise)


def test_loading_and_rendering_print_nothing(euler: Path, capfd: pytest.CaptureFixture[str]) -> None:
    render(PipelineAdapter.load(inspect(euler)), Case(prompt=LONG))
    assert capfd.readouterr() == ("", "")

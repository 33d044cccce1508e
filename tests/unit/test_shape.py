import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcdit.errors import InputError
from hpcdit.models.loading import ModelShape

WAN = ModelShape(40, 40, 128, 16, (1, 2, 2), 4, 8, multiple=16)


def refused(shape: ModelShape, num_frames: int, height: int, width: int) -> str:
    """What a size is refused with; empty if it is legal."""
    try:
        shape.legal(num_frames, height, width)
    except InputError as error:
        return str(error)
    return ""


def test_a_video_is_as_many_tokens_as_its_latents_have_patches() -> None:
    assert WAN.latents(81, 480, 832) == (16, 21, 60, 104)
    assert WAN.tokens(81, 480, 832) == 32_760
    assert WAN.tokens(1, 16, 16) == 1
    assert WAN.tokens(9, 48, 80) == 3 * 3 * 5


@pytest.mark.parametrize("sizes", [(81, 480, 832), (1, 16, 16), (9, 48, 80), (4093, 16384, 16384)])
def test_sizes_that_the_model_can_make_pass(sizes: tuple[int, int, int]) -> None:
    assert refused(WAN, *sizes) == ""


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 480, 832), "num_frames: 80 .* allowed: 4k \\+ 1 up to 4093; nearest: 77 or 81"),
        ((0, 480, 832), "num_frames: 0 .* nearest: 1"),
        ((4097, 480, 832), "num_frames: 4097 .* nearest: 4093"),
        ((81, 500, 832), "height: 500 .* allowed: multiples of 16 up to 16384; nearest: 496 or 512"),
        ((81, 480, 8), "width: 8 .* nearest: 16"),
        ((81, 480, 1 << 40), "width: 1099511627776 .* nearest: 16384"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest_that_pass(sizes: tuple[int, int, int], message: str) -> None:
    assert re.fullmatch(message, refused(WAN, *sizes))


@given(
    size=st.integers(-5, 400),
    axis=st.integers(0, 2),
    patch=st.tuples(*[st.integers(1, 3)] * 3),
    temporal=st.integers(1, 4),
    spatial=st.integers(1, 8),
    rows=st.integers(6, 20),
    multiple=st.sampled_from([1, 4, 6]),
)
def test_no_legal_size_is_nearer_than_those_named(
    size: int, axis: int, patch: tuple[int, int, int], temporal: int, spatial: int, rows: int, multiple: int
) -> None:
    shape = ModelShape(2, 5, 14, 16, patch, temporal, spatial, rows, multiple)
    legal = [  # by the definition: whole latents, whole patches, a row of the rotary table for each
        [temporal * (patch[0] * n - 1) + 1 for n in range(1, rows + 1)],
        *([n for n in range(1, p * spatial * rows + 1) if n % (p * spatial) == n % multiple == 0] for p in patch[1:]),
    ]
    sizes = [good[0] for good in legal]
    sizes[axis] = size
    message = refused(shape, *sizes)
    if size in legal[axis]:
        assert message == ""
        counts = zip(shape.latents(*sizes)[1:], patch, strict=True)
        assert all(n % p == 0 and 1 <= n // p <= rows for n, p in counts)
        return
    below, above = [n for n in legal[axis] if n < size][-1:], [n for n in legal[axis] if n > size][:1]
    assert message.startswith(f"{('num_frames', 'height', 'width')[axis]}: {size} ")
    assert message.endswith(f"nearest: {' or '.join(map(str, below + above))}")


def test_latent_frames_before_the_video_s_make_whole_patches_of_it() -> None:
    """As in CogVideoX 1.5: 21 latent frames and one more are eleven pairs."""
    shape = ModelShape(2, 5, 16, 16, (2, 2, 2), 4, 8, before=1)
    assert [refused(shape, n, 480, 720) for n in (1, 81, 161)] == [""] * 3
    assert refused(shape, 85, 480, 720).endswith("allowed: 8k + 1 up to 8185; nearest: 81 or 89")
    assert shape.latents(81, 480, 720)[1] == 22 and shape.num_frames(22) == 81
    assert shape.tokens(81, 480, 720) == 11 * 30 * 45


def test_frames_that_the_vae_makes_in_pairs_of_latent_frames_come_in_no_other_number() -> None:
    """As in CogVideoX: asked for 45 frames, diffusers makes 48."""
    shape = ModelShape(2, 5, 16, 16, (1, 2, 2), 4, 8, frame_multiple=8)
    assert [refused(shape, n, 480, 720) for n in (1, 9, 49)] == [""] * 3
    assert refused(shape, 45, 480, 720).endswith("allowed: 8k + 1 up to 4089; nearest: 41 or 49")


def test_a_model_of_one_size_takes_no_other() -> None:
    shape = ModelShape(2, 5, 16, 16, (1, 2, 2), 4, 8, only=(480, 720))
    assert refused(shape, 49, 480, 720) == ""
    assert refused(shape, 49, 496, 720) == "height: 496; allowed: 480, as of this model"
    assert refused(shape, 49, 480, 480) == "width: 480; allowed: 720, as of this model"


def test_height_and_width_may_end_at_different_sizes() -> None:
    shape = ModelShape(2, 5, 16, 16, (2, 2, 2), 4, 8, most=(770, 1360))
    assert refused(shape, 85, 768, 1360) == ""
    assert refused(shape, 85, 784, 1360).endswith("up to 768; nearest: 768")
    assert refused(shape, 85, 768, 1376).endswith("up to 1360; nearest: 1360")

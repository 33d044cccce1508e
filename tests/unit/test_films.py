"""MP4 files that are asked for when the videos are finished already."""

import os
from pathlib import Path

import av
import pytest
import torch

from hpcdit.config import Sampling
from hpcdit.device import Device, cpu
from hpcdit.errors import BrokenRun
from hpcdit.output import media, store
from hpcdit.render import films
from tests.unit.test_media import clip, decoded, far
from tests.unit.test_store import EVENTS, RECORD

SIZES = Sampling(num_frames=5, height=48, width=64, steps=1, guidance_scale=1, seed=0, fps=16, max_sequence_length=8)


def test_which_encoder_a_run_uses_and_why_is_one_line() -> None:
    told: list[str] = []
    assert films.encoder(cpu(), SIZES, told.append) == media.X264
    gpu = Device(torch.device("cuda", 99), cpu().kernels, "no GPU")
    assert films.encoder(gpu, SIZES, told.append) == media.X264
    assert told[0] == "MP4 files: libx264"
    assert told[1].startswith("MP4 files: libx264, since h264_nvenc does not start: ")


def test_videos_without_an_mp4_get_one_and_others_keep_theirs(tmp_path: Path) -> None:
    for id in ("a", "b.c"):
        store.write_video(tmp_path / f"{id}.h5", clip(5, 48, 64), RECORD, EVENTS)
    (tmp_path / "a.mp4").write_bytes(b"mine")
    assert films.missing(tmp_path, ["a", "b.c", "to do"]) == ["b.c"]
    assert films.make(tmp_path, ["a", "b.c"]) == 1
    assert far(decoded(tmp_path / "b.c.mp4"), clip(5, 48, 64)) < 6
    with av.open(str(tmp_path / "b.c.mp4")) as film:
        assert film.streams.video[0].average_rate == RECORD.fps
    assert (tmp_path / "a.mp4").read_bytes() == b"mine" and len(os.listdir(tmp_path)) == 4
    assert films.missing(tmp_path, ["a", "b.c"]) == []


def test_a_damaged_video_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"none")
    with pytest.raises(BrokenRun, match=r"a\.mp4 cannot be made: .*not an HDF5 file"):
        films.make(tmp_path, ["a"])

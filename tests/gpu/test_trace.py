"""The times of what GPUs do inside their graphs."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

import hpcdit.models
from hpcdit.attention.methods import Layout
from hpcdit.attention.schedule import Attend, Pull
from hpcdit.models.loading import inspect, shape
from tests.gpu.test_render import PLAIN, frames, one_gpu, two_gpus
from tests.system.program import Start

DEMO = Path(hpcdit.models.__file__).parent / "demo"
STEPS, PASSES = 4, 2


def inside(events: np.ndarray, outer: np.void) -> np.ndarray:
    """The events whose middle is in `outer`."""
    middles = (events["start"] + events["end"]) / 2
    return events[(outer["start"] < middles) & (middles < outer["end"])]


def check(path: Path) -> None:
    """The trace of a video: in every step as many spans as the schedule has steps, where they must be."""
    with h5py.File(path) as file:
        events, plan = file["trace/events"][:], json.loads(file.attrs["plan"])
    layout = Layout(*(plan[key] for key in ("method", "ulysses", "ring", "pieces", "groups")))
    layers, schedule = shape(inspect(DEMO)).layers, layout.schedule()
    for rank, mine in enumerate(schedule.ranks):
        own = events[events["rank"] == rank]
        steps = np.sort(own[own["name"] == b"step"], order="start")
        passes = own[own["name"] == b"pass"]
        assert len(steps) == STEPS and len(passes) == STEPS * PASSES
        assert np.sum(own["name"] == b"between steps") == STEPS - 1
        assert [len(inside(passes, step)) for step in steps] == [PASSES] * STEPS
        for one in passes:
            found = inside(own, one)
            attends = np.sort(found[found["name"] == b"attend"], order="start")
            assert len(attends) == sum(isinstance(s, Attend) for s in mine) * layers
            durations = attends["end"] - attends["start"]
            assert (durations > 0).all() and durations.sum() <= one["end"] - one["start"]
            assert (attends["start"][1:] >= attends["end"][:-1] - 5e-6).all(), "one stream computes"
            pulls = [name for name in found["name"] if name in (b"pull q", b"pull k", b"pull v")]
            assert len(pulls) == sum(isinstance(s, Pull) for s in mine) * layers


@pytest.mark.parametrize(
    ("start", "how"),
    [
        pytest.param(None, ("model.graph=true",), marks=one_gpu, id="graph"),
        pytest.param(None, ("model.graph=false",), marks=one_gpu, id="eager"),
        pytest.param(2, ("model.graph=true",), marks=two_gpus, id="two GPUs"),
        pytest.param(2, ("model.graph=true", "cluster.ranks_per_node=1"), marks=two_gpus, id="two nodes"),
        pytest.param(2, ("transport.kind=mpi",), marks=two_gpus, id="two GPUs by way of the host"),
    ],
)
def test_what_gpus_do_is_recorded_where_they_do_it(start: Start, how: tuple[str, ...], tmp_path: Path) -> None:
    common = ("model.device=cuda", "parallel.replicas=1", "parallel.cfg=1", *PLAIN, *how)
    wanted = frames(start, tmp_path, "untraced", *common)
    found = frames(start, tmp_path, "traced", *common, "trace.level=2")
    peak = re.search(r"peak GPU memory: ([\d.]+) GiB.* ([\d.]+) GiB planned", (tmp_path / "traced/run.log").read_text())
    assert peak and float(peak[1]) > 0 and float(peak[2]) > 0
    for path in sorted((tmp_path / "traced" / "videos").glob("*.h5")):
        check(path)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))

"""mode=plan as it is called: what it prints, and one line for what cannot be planned."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcdit.app import main
from hpcdit.config import load, resolve_sampling
from hpcdit.render.plan import NOT_FLOAT32, report, workload
from tests.unit.test_shape import WAN

BIG = ("mode=plan", "model=wan2.1-14b", "model.dtype=bfloat16", "sampling.height=720", "sampling.width=1280")


def planned(*argv: str) -> str:
    config = load(["mode=plan", *argv])
    assert config is not None
    return report(config)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("preset", ["4x8-a100", "4x8-h100", "ethernet", "one-node"])
def test_every_preset_can_be_read_in_120_columns(preset: str) -> None:
    text = planned(*BIG, f"cluster={preset}")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("wan2.1-14b, bfloat16: 1 video of 75600 tokens, 50 steps, guided; 40 heads of 128")
    assert "costs as given" in lines[1]
    (chosen,) = [line for line in lines if line.startswith("> ")]
    assert " s" in chosen and "GB" in chosen
    assert any(line.startswith("node 0 rank ") for line in lines) and "= attends" in lines[-1]


def test_one_s_own_figures_change_the_plan() -> None:
    slow = planned(*BIG, "cluster=4x8-h100", "cluster.costs.inter_gb_s=0.1", "parallel.cfg=1")
    quick = planned(*BIG, "cluster=4x8-h100", "cluster.costs.inter_gb_s=1000", "parallel.cfg=1")
    assert slow.splitlines()[1:] != quick.splitlines()[1:]
    (chosen,) = [line for line in slow.splitlines() if line.startswith("> ")]
    assert "4 replicas" in chosen


def test_a_plan_says_when_its_costs_are_of_smaller_numbers_than_the_model_s() -> None:
    said = NOT_FLOAT32
    assert said in planned("model=wan2.1-14b", "cluster=one-node")
    assert said not in planned(*BIG, "cluster=one-node")
    own = ("cluster.costs.attention_tflops=40", "cluster.costs.matmul_tflops=50")
    assert said not in planned("model=wan2.1-14b", "cluster=one-node", *own)


def test_the_batch_is_the_prompts_file_s_or_as_large_as_is_said(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b", "num_frames": 41}, {"prompt": "c", "steps": 20}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "3 videos of 32760 tokens" in planned("model=wan2.1-14b", f"prompts={prompts}")
    assert "7 videos of 32760 tokens" in planned("model=wan2.1-14b", f"prompts={prompts}", "plan.videos=7")
    assert "demo, float32: 1 video of 324 tokens" in planned()


def test_a_plan_of_a_million_videos_takes_no_longer() -> None:
    start = time.process_time()
    assert "1000000 videos of 324 tokens" in planned("plan.videos=1000000")
    assert time.process_time() - start < 3


def test_a_batch_is_planned_for_its_largest_video() -> None:
    config = load(["mode=plan", "model=wan2.1-14b"])
    assert config is not None
    usual = resolve_sampling(config, "wan")
    small = type(usual)(**{**vars(usual), "num_frames": 41, "guidance_scale": 1.0})
    work = workload(WAN, [small, usual, small], "bfloat16")
    assert (work.tokens, work.videos, work.guided, work.itemsize, work.latents) == (32_760, 3, True, 2, 2_096_640)
    assert not workload(WAN, [small], "float32").guided


def test_what_cannot_be_planned_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cluster=9x9: no such option" in refused(capsys, "mode=plan", "cluster=9x9")
    assert "their product must be the 32 ranks" in refused(capsys, *BIG, "cluster=4x8-h100", "parallel.ulysses=3")
    assert "hpcdit: sampling.num_frames: 34 is a size" in refused(capsys, "mode=plan", "sampling.num_frames=34")
    assert "no layout fits" in refused(capsys, *BIG, "cluster=4x8-a100", "cluster.costs.memory_gb=20")
    assert "parallel.replicas=3" in refused(capsys, *BIG, "cluster=4x8-h100", "parallel.replicas=3")
    assert "parallel.groups=41" in refused(capsys, *BIG, "cluster=4x8-h100", "parallel.groups=41")


def test_planning_loads_neither_torch_nor_mpi() -> None:
    code = (
        "import sys; from hpcdit.app import main; main(['mode=plan', 'cluster=4x8-h100', 'model=wan2.1-1.3b']);"
        " print(sorted({'torch', 'diffusers', 'transformers', 'mpi4py'} & set(sys.modules)))"
    )
    root = str(Path(__file__).resolve().parents[2])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, text=True, capture_output=True
    )
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "[]"), result.stderr

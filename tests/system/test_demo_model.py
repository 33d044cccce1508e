"""The shipped model, rendered as users do, shows what its captions ask for, in the eyes of the judge."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tests.system.program import run
from tools.demo_model import captions
from tools.demo_model.judge import Case, judge

CAPTIONS = """
a red triangle moving left on grey
a green star moving down on white
a blue star moving up and a yellow circle moving left on grey
a red square moving left and a purple circle moving right on white
a blue circle standing still and a pink triangle moving right on grey
"""


def judged(out: Path) -> tuple[list[Case], list[str]]:
    """All of a folder's videos, and what is wrong with those that are."""
    cases = [judge(path) for path in sorted((out / "videos").glob("*.h5"))]
    return cases, [f"{case.wanted}; seen: {case.seen}" for case in cases if not case.verdict.all]


def test_the_shipped_model_shows_what_captions_ask_for(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(CAPTIONS)
    # Two ranks that stand for two nodes: attention is shared out, and transfers cross between them.
    ended = run(2, "prompts=prompts.txt", "output.dir=out", "cluster.ranks_per_node=1", cwd=tmp_path, timeout_s=600)
    assert ended.returncode == 0, ended.stderr
    cases, wrong = judged(tmp_path / "out")
    # One may be lost to another machine's rounding. Seen with faults: rotary tables with a wrong sign, queries of zero,
    # noise of half their size on the weights: none right.
    assert len(cases) == 5 and len(wrong) <= 1, wrong


def test_its_twin_moves_what_a_picture_shows(tmp_path: Path) -> None:
    assert captions.main(["--pictures", "--count", "3", "-o", str(tmp_path / "prompts.jsonl")]) == 0
    ended = run(2, "model=demo-image", "prompts=prompts.jsonl", "output.dir=out", cwd=tmp_path, timeout_s=600)
    assert ended.returncode == 0, ended.stderr
    cases, wrong = judged(tmp_path / "out")
    assert len(cases) == 3 and not wrong, wrong
    for path in (tmp_path / "out" / "videos").glob("*.h5"):
        with h5py.File(path) as file:
            first = file["frames"][0].astype(float)
        given = np.asarray(Image.open(tmp_path / "prompts-pictures" / f"{path.stem}.png"), float)
        # Seen, of 59 captions: up to 10 levels. 48, of the second and third, where their things start elsewhere.
        assert np.sqrt(((first - given) ** 2).mean()) < 12

"""Writes what training made as a folder in diffusers' format, float16, with a model card.

usage: python -m tools.demo_model.export outputs/demo_model FOLDER [--image]
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from .captions import COLOURS, FORM, GROUNDS, MOTIONS, SHAPES
from .evaluate import rendering
from .settings import Settings, settings
from .training import averaged, cost

LARGEST = 25_000_000  # bytes of a file that a package may hold


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a trained demo model as a folder in diffusers' format.")
    parser.add_argument("run", type=Path, help="the folder that training wrote")
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--image", action="store_true", help="the image-to-video model, not the text-to-video one")
    arguments = parser.parse_args(words)
    try:
        config = OmegaConf.load(arguments.run / "config.yaml")
        assert isinstance(config, DictConfig)
        config.out, config.device = str(arguments.run), "cpu"
        export(settings(config), arguments.folder, "image" if arguments.image else "text")
    except (OSError, ValueError, IndexError) as error:
        print("export:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB")
    return 0


def export(made: Settings, folder: Path, kind: str) -> None:
    """Writes the last stage that trains `kind`, "text" or "image". Raises ValueError for a file that is too large."""
    path = made.folder / f"{made.last(kind)}.safetensors"
    pipe = rendering(made, averaged(path, "transformer"), averaged(path, "text_encoder"))
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        part.to(torch.float16)
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file}: {file.stat().st_size} bytes; allowed: up to {LARGEST}")
    (folder / "README.md").write_text(card(made, kind))


def card(made: Settings, kind: str) -> str:
    """How the model was made: what it knows, stages, seed, cost and figures."""
    last = made.last(kind)
    names = list(made.stages)[: list(made.stages).index(last) + 1]
    lines = [
        f"# The demo model of hpcdit: {kind} to video",
        "",
        "Coloured shapes that move, made for this project by `tools/demo_model`; no data of others. Apache-2.0.",
        "",
        f'Captions: "{FORM}". {"; ".join(", ".join(group) for group in (COLOURS, SHAPES, MOTIONS, GROUNDS))}.',
        "",
        f"Seed {made.seed}. Weights are running averages, in float16.",
        "",
        "| stage | trains | steps | batch | learning rate | sizes | seconds | device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        stage = made.stages[name]
        steps, seconds, device = cost(made.folder / f"{name}.safetensors")
        sizes = ", ".join("x".join(map(str, made.sizes[size])) for size in stage.sizes)
        lines.append(
            f"| {name} | {stage.trains} | {steps} of {stage.steps} | {stage.batch} | {stage.lr:g} to {stage.lr_end:g} |"
            f" {sizes} | {seconds:.0f} | {device} |"
        )
    lines += ["", "Figures on what was held out, at the end of each stage (percentages of clips, dB):", ""]
    return "\n".join([*lines, *_figures(made, names), ""])


def _figures(made: Settings, names: Sequence[str]) -> list[str]:
    with (made.folder / "curve.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] not in ("loss", "lr")]
    lines = []
    for name in names:
        mine = [row for row in rows if row["stage"] == name]
        last = [row for row in mine if row["step"] == mine[-1]["step"]] if mine else []
        values = {row["name"]: float(row["value"]) for row in last}
        lines.append(f"- {name}: " + (", ".join(f"{key} {value:.1f}" for key, value in values.items()) or "none taken"))
    return lines


if __name__ == "__main__":
    sys.exit(main())

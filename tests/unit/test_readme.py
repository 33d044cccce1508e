"""What README.md says of the models is what the tests of the families run, and what the families say of themselves."""

import re
from pathlib import Path

import pytest

from hpcdit.config import load
from hpcdit.models.families import families
from hpcdit.models.rows import CLASSES
from tests.families import EXAMPLES, PROMPTS, pipeline_of
from tests.mpi.families import LAYERS, LAYOUTS, PROGRAM
from tests.unit.test_lora_diffusers import examples as with_lora
from tests.vaes import VAES

README = Path(__file__).parents[2] / "README.md"
FAMILY = {pipeline: family for family in families().values() for pipeline in family.pipelines}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called so, by the names of the columns."""
    lines = README.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end])
    return [dict(zip(head, row, strict=True)) for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


MODELS = {quoted(row["pipeline"])[0]: row for row in table("pipeline")}


def test_every_pipeline_has_a_row_and_a_command_that_the_program_takes() -> None:
    assert sorted(MODELS) == sorted(FAMILY)
    commands = dict.fromkeys(MODELS, "")
    for words, pipeline in re.findall(
        r"^mpirun -n 4 python -m hpcdit (.*?) +# (\w+Pipeline)$", README.read_text(), re.M
    ):
        assert commands[pipeline] == ""
        commands[pipeline] = words
        config = load(words.split())
        assert config is not None and config.model.path and config.prompts == "my.jsonl"
    assert all(commands.values())


@pytest.mark.parametrize("pipeline", MODELS)
def test_each_cell_is_what_tests_run_or_the_family_says(pipeline: str) -> None:
    family = FAMILY[pipeline]
    mine = {name: example for name, example in EXAMPLES.items() if pipeline_of(name) == pipeline}
    (made,) = {(example.images, example.image) for example in mine.values()}
    (guided,) = {example.guided for example in mine.values()}
    rendered = [name for name in PROGRAM if name in mine]
    (vae,) = family.components["vae"].classes
    said: dict[str, object] = {
        "makes": f"{'image' if made[0] else 'video'} from {'a picture' if made[1] else 'text'}",
        "methods": str(len({method for layouts in LAYOUTS.values() for _, method, _, _ in layouts})),
        "ranks": f"{min(LAYOUTS)}-{max(LAYOUTS)}",
        "`parallel.batch`": str(len(PROMPTS)),
        "`parallel.cfg=2`": guided and bool(rendered),
        "`model.layers`": "resident" not in LAYERS and bool(rendered),
        "`model.lora`": not mine.keys().isdisjoint(with_lora()),
        "`parallel.vae=rows`": vae in CLASSES,
        "`model.graph`": family.graphs(False) or ("with FlashAttention 3" if family.graphs(True) else False),
    }
    row = dict(MODELS[pipeline])
    del row["pipeline"]
    assert row == {key: ("yes" if cell else "") if isinstance(cell, bool) else cell for key, cell in said.items()}


def test_every_method_is_run_on_every_number_of_ranks() -> None:
    assert {frozenset(method for _, method, _, _ in layouts) for layouts in LAYOUTS.values()} == {
        frozenset({"torus", "tas", "usp", "ulysses", "ring"})
    }


def test_every_vae_that_is_decoded_by_rows_is_tested_to_be() -> None:
    assert {type(make()).__name__ for make in VAES.values()} == set(CLASSES)


def test_the_schedulers_named_are_those_that_a_family_takes_and_examples_are_denoised_by() -> None:
    said = {name: set(quoted(row["schedulers"])) for row in table("family") for name in quoted(row["family"])}
    assert said == {
        name: {*family.components["scheduler"].classes, *family.schedulers} for name, family in families().items()
    }
    for name, family in families().items():
        chosen = {s for e, example in EXAMPLES.items() if FAMILY[pipeline_of(e)] is family for s in example.schedulers}
        assert said[name] - chosen <= set(family.components["scheduler"].classes[:1]), f"{name}: not tested"

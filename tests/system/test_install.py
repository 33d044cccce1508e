"""A wheel holds all that a run needs: installed elsewhere, started in an empty folder, it finds its files."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "hpcdit", "conf")


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folder, and without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(source))
    run(sys.executable, "-m", "pip", *build, cwd=out)
    (file,) = out.glob("hpcdit-*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package_and_of_conf(wheel: Path) -> None:
    def files(folder: str, inside: str) -> set[str]:
        found = (p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc")
        return {f"{inside}/{p.relative_to(ROOT / folder).as_posix()}" for p in found}

    expected = files("hpcdit", "hpcdit") | files("conf", "hpcdit/conf")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_an_installed_wheel_finds_its_files_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    run(sys.executable, "-m", "pip", *install, cwd=empty)
    ask = (
        "import json; from hpcdit.config import conf_dir, demo_model, demo_prompts;"
        " print(json.dumps([str(p) for p in (conf_dir(), demo_model(), demo_prompts()) if p.exists()]))"
    )
    # -P: nothing is found in the folder where it is started.
    said = run(sys.executable, "-P", "-c", ask, cwd=empty, PYTHONPATH=str(site))
    assert said.count(str(site)) == 3
    config = run(sys.executable, "-P", "-m", "hpcdit", "--cfg", "job", cwd=empty, PYTHONPATH=str(site))
    assert "name: demo" in config
    assert list(empty.iterdir()) == []


def test_a_checkout_runs_without_installation(tmp_path: Path) -> None:
    config = run(sys.executable, "-P", "-m", "hpcdit", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "name: demo" in config
    assert list(tmp_path.iterdir()) == []

"""The wheel: built, installed into an environment of its own, used from another folder by the program ``mfdist``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel; its dependencies are those of this environment."""
    pytest.importorskip("setuptools", minversion="69", reason="building a wheel needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mfdist", source / "mfdist", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (wheel,) = folder.glob("mfdist-*.whl")
    python = folder / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shutil.rmtree(source)
    return folder / "venv/bin"


def program(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([installed / "mfdist", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def test_from_a_file_to_an_evaluation(installed: Path, tmp_path: Path) -> None:
    rows = [f"u{k % 40},i{k * 7 % 30},{k % 5 + 1},{k}" for k in range(600)]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    small = ["--batch-size", "64", "--emb-dim", "4", "--epochs", "1", "--device", "cpu"]
    for arguments in (
        ["prepare", "ratings.csv", "--out", "data", "--lanes", "4"],
        ["train", "--data", "data", "--run-dir", "one", "--config", "vignette_mf_advanced", *small],
        ["launch", "--standalone", "--nproc-per-node=2", "train", "--data", "data", "--run-dir", "two", "--config",
         "vignette_mf_advanced", *small],
        ["evaluate", "one", "two", "--out", "table.json"],
    ):  # fmt: skip
        done = program(installed, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    one, two = (run["val_rmse"] for run in json.loads((tmp_path / "table.json").read_text())["runs"])
    assert abs(one - two) < 1e-4
    assert not list(installed.parent.glob("lib/python*/site-packages/mfdist/**/*.csv"))


def test_the_program_says_what_it_can_do(installed: Path, tmp_path: Path) -> None:
    done = program(installed, tmp_path, "--help")
    assert done.returncode == 0 and "prepare" in done.stdout and "launch" in done.stdout
    assert program(installed, tmp_path, "--version").stdout.startswith("mfdist ")
    assert program(installed, tmp_path).returncode == 2
    unknown = program(installed, tmp_path, "trian")
    assert unknown.returncode == 2 and "no job 'trian'" in unknown.stderr and "Did you mean 'train'?" in unknown.stderr

"""The set-up: made once, finished after an interruption, quick when there is nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A python3 that notes what it is asked to do and makes a .venv with itself as the interpreter.
FAKE = """#!/bin/bash
log={folder}/calls
case "$*" in
  *importlib.metadata*) echo 2.13.0+cpu ;;
  -c*) [ -z "${{FAKE_OLD:-}}" ] || case "$*" in *version_info\\ \\<*) exit 1;; esac; echo "(3, 11)"; exit 0 ;;
  "-m venv"*) echo venv >> $log; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip --version"*) [ -f {folder}/fake.py3 ] && exit 0 ;;
  *"pip install"*) echo "install ${{*:6}}" >> $log; [ ! -f {folder}/break ] || exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", folder / "scripts/setup")
    shutil.copy(ROOT / "pyproject.toml", folder)
    fake = folder / "fake.py3"
    fake.write_text(FAKE.format(folder=folder))
    fake.chmod(0o755)
    return folder


def set_up(checkout: Path, **env: str) -> tuple[int, list[str]]:
    """Exit code of scripts/setup, and what the fake interpreter was asked to do in this run."""
    calls = checkout / "calls"
    calls.write_text("")
    result = subprocess.run(
        [str(checkout / "scripts/setup")], cwd="/", capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(checkout / "fake.py3"), **env},
    )  # fmt: skip
    return result.returncode, calls.read_text().splitlines()


def test_torch_comes_first_and_a_second_run_does_nothing(checkout: Path) -> None:
    assert set_up(checkout) == (0, ["venv", "install torch==2.13.0", "install torch==2.13.0+cpu -e .[test]"])
    assert set_up(checkout) == (0, [])


def test_an_interrupted_set_up_is_finished(checkout: Path) -> None:
    (checkout / "break").touch()
    code, calls = set_up(checkout)
    assert code != 0 and calls == ["venv", "install torch==2.13.0"]
    (checkout / "break").unlink()
    assert set_up(checkout) == (0, ["install torch==2.13.0", "install torch==2.13.0+cpu -e .[test]"])


def test_a_changed_pyproject_installs_again(checkout: Path) -> None:
    set_up(checkout)
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert set_up(checkout)[1] == ["install torch==2.13.0", "install torch==2.13.0+cpu -e .[test]"]


def test_an_old_python_is_refused(checkout: Path) -> None:
    assert set_up(checkout, FAKE_OLD="1") == (2, [])


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/quickstart", "scripts/test", ".ci/run"])
def test_syntax_and_mode(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert os.access(ROOT / name, os.X_OK)


def test_no_registry_host_in_any_file() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        text = (ROOT / name).read_text(errors="replace") if (ROOT / name).is_file() else ""
        for host in ("pypi" + ".org", "download.py" + "torch.org", "--extra-" + "index-url", "docker" + ".io"):
            assert host not in text, f"{name} names {host}"

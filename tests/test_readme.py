"""The README: every command in it has flags that exist, every file it names is there, its file tree is complete."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for line in TEXT.splitlines()
    if re.match(r"    (python|torchrun|[A-Z_]+=|kubectl|docker|scripts/)", line)
]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))


def job_and_flags(command: str) -> tuple[str, list[str]] | None:
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if word.startswith("jobs/") and word.endswith(".py"):
            return Path(word).stem, words[place + 1 :]
        if word.endswith("train.sbatch"):
            return "train", words[place + 1 :]
    return None


@pytest.mark.parametrize("command", [command for command in COMMANDS if job_and_flags(command)])
def test_flags_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the job as soon as its flags are read: by replacing what reads them."""
    from mfdist import config

    class Read(Exception):
        pass

    original = config.parse_config

    def parse_and_stop(*args: object, **kwargs: object) -> None:
        original(*args, **kwargs)  # type: ignore[arg-type]
        raise Read

    found = job_and_flags(command)
    assert found is not None
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"jobs.{found[0]}")
    monkeypatch.setattr(module, "parse_config", parse_and_stop)
    with pytest.raises(Read):
        module.main(found[1])


def test_there_are_commands() -> None:
    shown = {found[0] for command in COMMANDS if (found := job_and_flags(command))}
    assert {"prepare", "train", "baseline_svd", "evaluate", "recommend", "plan"} <= shown


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(?:jobs|scripts|k8s|tests|mfdist)/[\w./-]*\w", TEXT))))
def test_every_file_that_is_named_is_there(name: str) -> None:
    assert (ROOT / name).exists()


def tree() -> dict[str, list[str]]:
    """Folder -> names listed under it in the file tree."""
    found: dict[str, list[str]] = {}
    folder = ""
    for line in TEXT.splitlines():
        if match := re.match(r"    (\w+)/ {2,}\S", line):
            folder = match[1]
            found[folder] = []
        elif folder and (match := re.match(r"      ([\w.-]+/?) {2,}\S", line)):
            found[folder].append(match[1].rstrip("/"))
    return found


@pytest.mark.parametrize("folder", ["mfdist", "jobs"])
def test_the_file_tree_is_complete(folder: str) -> None:
    there = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    there |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    listed = set(tree().get(folder, []))
    assert listed >= there, f"not in the README: {sorted(there - listed)}"
    assert {name for name in listed if name.endswith(".py")} <= there, "the README lists files that are gone"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module(f"jobs.{job}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--help" in text and re.search(r"^usage: ", text)

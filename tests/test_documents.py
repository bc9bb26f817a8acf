"""The documents: every command in them has flags that exist, every file they name is there."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from mfdist.__main__ import JOBS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT) for path in ROOT.glob("**/README.md") if not path.relative_to(ROOT).parts[0].startswith(".")
)
COMMAND = re.compile(r"    (python|torchrun|mfdist|[A-Z_]+=|kubectl|docker|sbatch|scripts/|pip)\b")
LINES = [line for document in DOCUMENTS for line in (ROOT / document).read_text().splitlines()]
COMMANDS = sorted({line.strip() for line in LINES if COMMAND.match(line)})


def job_and_flags(command: str) -> tuple[str, list[str]] | None:
    """The job's name (of ``mfdist.jobs``) and its arguments; None for commands of others."""
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if word.startswith("jobs/") and word.endswith(".py"):
            return Path(word).stem.removesuffix("_svd"), words[place + 1 :]
        if word.endswith("train.sbatch"):
            return "train", words[place + 1 :]
        if word.endswith("prepare-spark.sbatch"):
            return "prepare", words[place + 1 :]
    if words[0] == "mfdist" and words[1] == "launch":
        job = next(word for word in words[2:] if not word.startswith("-"))
        return job, words[words.index(job) + 1 :]
    return (words[1], words[2:]) if words[0] == "mfdist" else None


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
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"mfdist.jobs.{found[0]}")
    monkeypatch.setattr(module, "parse_config", parse_and_stop)
    with pytest.raises(Read):
        module.main(found[1])


def test_there_are_commands() -> None:
    shown = {found[0] for command in COMMANDS if (found := job_and_flags(command))}
    assert {"prepare", "train", "baseline", "evaluate", "recommend", "plan"} <= shown


def test_the_jobs_document_is_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    document_jobs = importlib.import_module("document_jobs")
    assert (ROOT / "jobs/README.md").read_text() == document_jobs.document(), "run scripts/document_jobs.py"


EXAMPLES = sorted(path for path in (ROOT / "mfdist").rglob("*.py") if re.search(r"^\s*>>> ", path.read_text(), re.M))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    found = doctest.testmod(importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)))
    assert found.attempted and not found.failed


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def named_files() -> list[tuple[Path, str]]:
    """(document, path in the repository that it names)."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        found += [(document, name) for name in re.findall(r"\b(?:jobs|scripts|k8s|tests|mfdist)/[\w./*-]*[\w*]", text)]
    return sorted({(document, name) for document, name in found if not re.search(r"\b(JOB|NAME)\b", name)})


@pytest.mark.parametrize(("document", "name"), named_files())
def test_every_file_that_is_named_is_there(document: Path, name: str) -> None:
    assert list(ROOT.glob(name))


def test_every_job_is_a_program_of_the_checkout_and_of_the_installation() -> None:
    scripts = {path.stem.removesuffix("_svd") for path in (ROOT / "jobs").glob("*.py")}
    modules = {path.stem for path in (ROOT / "mfdist/jobs").glob("*.py")} - {"__init__"}
    assert scripts == modules == set(JOBS)


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_job_has_help(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"mfdist.jobs.{job}").main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "--help" in text and re.search(r"^usage: ", text)

"""What ``--help`` says: snapshots of every job's, and that no flag is lost between it and ``--help-all``."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import snapshots

from mfdist.__main__ import JOBS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from document_jobs import config_class


def help_of(job: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [f"mfdist {job}"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"mfdist.jobs.{job}").main([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("job", sorted(JOBS))
def test_help_is_as_it_was_read(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots.check(f"help-{job}.txt", help_of(job, "--help", monkeypatch, capsys))


@pytest.mark.parametrize("job", sorted(JOBS))
def test_help_all_has_every_flag_and_help_says_how_many_it_leaves_out(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(config_class(job)) if "group" in f.metadata}
    every, basic = (help_of(job, flag, monkeypatch, capsys) for flag in ("--help-all", "--help"))
    shown = [set(re.findall(r"^  (?:-h, )?(--[a-z][a-z0-9-]*)", text, re.M)) for text in (every, basic)]
    assert shown[0] - {"--help", "--help-all", "--config"} == names
    left = len(shown[0] - shown[1])
    assert (f"{left} more flags" in basic) == (left > 0) and len(basic.splitlines()) <= 75

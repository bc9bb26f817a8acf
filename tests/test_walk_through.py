"""The walk-through of jobs/README.md: its commands in an empty folder, and what it says that they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = ROOT / "jobs/walk_through.md"
TIMES = re.compile(r"\b[\d.]+ (s|min|MiB|GiB|M ratings/s)\b")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(command, lines that it is said to print), in their order."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if re.match(r"    (mfdist|head) ", line):
            found.append((line.strip(), []))
        elif line.startswith("    ") and found:
            found[-1][1].append(line[4:])
    return found


def alike(shown: str, line: str) -> bool:
    """Whether a line is the one shown: the same words, figures within two hundredths, times of any length."""
    shown, line = (TIMES.sub(r"TIME \1", text) for text in (shown, line))
    number = r"-?\d[\d,]*\.?\d*"
    pattern = ".*".join(re.sub(number, lambda _: f"({number})", re.escape(part).replace(r"\-", "-").replace(r"\.", "."))
                        for part in shown.split("..."))  # fmt: skip
    matched = re.fullmatch(pattern + ".*" * shown.endswith("..."), line)
    pairs = zip(re.findall(number, shown), matched.groups(), strict=True) if matched else []
    values = [[float(text.replace(",", "").rstrip(".")) for text in pair] for pair in pairs]
    return matched is not None and all(abs(a - b) <= 0.02 * abs(a) + 1e-9 for a, b in values)


def test_alike_tells_figures_apart() -> None:
    assert alike("rmse 1.2706 after 3.1 s", "rmse 1.2710 after 12 s")
    assert not alike("rmse 1.2706 after 3.1 s", "rmse 1.5 after 3.1 s")
    assert alike("a: 5 users ...", "a: 5 users and more") and not alike("a: 5 users", "a: 5 items")


def test_there_are_ten_commands() -> None:
    jobs = [shown for command, shown in commands(WALK.read_text()) if command.startswith("mfdist")]
    assert len(jobs) == 10 and all(jobs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_walk(tmp_path: Path) -> None:
    for command, shown in commands(WALK.read_text()):
        words = shlex.split(command.replace("mfdist", f"{sys.executable} -m mfdist", 1))
        line = shlex.join(words) if ">" not in command else command
        done = subprocess.run(line, shell=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed = [one for one in (done.stdout + done.stderr).splitlines() if one.strip()]
        for text in shown:
            if text.strip() not in ("", "..."):
                assert any(alike(text.strip(), one.strip()) for one in printed), f"{command}: {text}\n{done.stdout}"
    for name in ("data/electronics/report/index.html", "runs/recipe/report.html", "comparison.html"):
        assert "<svg" in (tmp_path / name).read_text()

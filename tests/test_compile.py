"""mfdist compile: what it has compiled, no later job compiles; what it cannot do is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfdist.config import parse_config
from mfdist.errors import MfdistError, UsageError
from mfdist.log import Console
from mfdist.planning import warm_up
from mfdist.planning.warm_up import CompileConfig, compile_ahead

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_later_jobs_compile_nothing(tmp_path: Path) -> None:
    """Files of compiled kernels are counted: none comes after."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}

    def job(name: str, *flags: str) -> set[str]:
        command = [sys.executable, str(ROOT / f"jobs/{name}.py"), *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {path.name for path in (tmp_path / "kernels").rglob("*.nbc")}

    compiled = job("compile")
    assert len(compiled) > 50
    job("synthesize", "--rows", "30000", "--out", "ratings.csv")
    job("prepare", "ratings.csv", "--out", "data")
    for name in ("recipe", "quick", "svd", "vignette_mf", "vignette_mf_advanced", "ranking"):
        job("train", "--data", "data", "--config", name, "--run-dir", name, "--epochs", "2")
    job("evaluate", "recipe", "quick", "--html", "compared.html")
    job("recommend", "--run-dir", "recipe", "--out", "best.parquet")
    job("similar", "--run-dir", "recipe", "--out", "similar.parquet")
    found = job("predict", "ratings.csv", "--run-dir", "recipe", "--fold-in", "ratings.csv", "--out", "scored.parquet")
    assert found == compiled, sorted(found - compiled)


def test_a_part_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "DATA", "nonsense")
    with pytest.raises(MfdistError, match="the kernels of nonsense could not be compiled: KeyError"):
        compile_ahead(CompileConfig(), Console(False))


def test_only_what_has_kernels_of_its_own_can_be_large() -> None:
    assert parse_config(CompileConfig, ["--large", "recipe, quick"], "").large == ("recipe", "quick")
    assert "ranking" not in parse_config(CompileConfig, ["--large", "all"], "").large
    with pytest.raises(UsageError, match=r"--large: expected all, or some of .* not ranking"):
        parse_config(CompileConfig, ["--large", "ranking"], "")

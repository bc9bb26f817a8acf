"""Prepare on both engines: a Spark session for tests, and datasets compared byte for byte."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import fake_spark
import pytest

from mfdist.config import parse_config
from mfdist.errors import UsageError, exit_code_of
from mfdist.log import Console
from mfdist.prepare.prepare import PrepareConfig, prepare
from mfdist.prepare_spark.engine import SparkEngine
from mfdist.prepare_spark.session import check_installed, session


def skip_where_missing() -> None:
    """Skip the test, or its module, where PySpark or Java is missing, with the sentence that names it."""
    try:
        check_installed()
    except UsageError as error:
        pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module", params=["frames", "spark"], name="spark")
def spark_session(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prepare's sessions for a module: frames of this process in Spark's place, or one Spark of two threads."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "frames":
            fake_spark.pretend(patch)
            yield
            return
        skip_where_missing()
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with session("local[2]"):
            yield


def ended(argv: list[str], engine: Any = None) -> tuple[int, str]:
    """(exit code, what the user is told) of a prepare on an engine; sentences alone, without progress."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = exit_code_of(lambda: prepare(parse_config(PrepareConfig, argv, "test"), Console(), engine) and 0)
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return code, "".join(sorted(line for line in (out.getvalue() + err.getvalue()).splitlines(True) if is_plain(line)))


PROGRESS = ("read", "write", "count", "minimum counts", "time of the split", "find the pieces", "sorting", "drawing",
            "comparing", "writing", "bringing", "finding", "compiling kernels", "kernels compiled")  # fmt: skip


def is_plain(line: str) -> bool:
    """Whether a line is no word about progress, which engines have of their own."""
    return not line.startswith(PROGRESS)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_equal(folder: Path, argv: list[str]) -> tuple[int, str]:
    """Run prepare with ``argv`` on both engines into directories of one name: all bytes, words and codes are equal.

    Gives the exit code, and what was said.
    """
    ends = []
    for engine, place in ((None, "one"), (SparkEngine(None), "spark")):
        out = folder / place / "d"
        code, said = ended([*argv, "--out", str(out)], engine)
        ends.append((code, said.replace(str(out), "OUT")))
    assert ends[0] == ends[1], ends
    one, other = content(folder / "one"), content(folder / "spark")
    assert one.keys() == other.keys(), (one.keys() ^ other.keys(), ends)
    assert [name for name in one if one[name] != other[name]] == []
    return ends[0]

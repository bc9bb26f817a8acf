"""Prepare on a Spark cluster of real processes that lose executors, fail, speculate, or lose their driver (slow)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepare_files import sample, write_csv
from spark_runs import content, ended, skip_where_missing

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STAGES = ["cut_task", "read_task", "gather_task", "count_task", "number_task", "write_task"]
CLUSTER = "local-cluster[2,1,1024]"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """Flags of a job with every stage, and what one machine makes of them."""
    skip_where_missing()
    folder = tmp_path_factory.mktemp("source")
    rows: list[Any] = [*sample(6000, users=300), ("u1", "i1", "five", 10**9)]
    edges = [0, 3000, 3600, 4200, 4800, 5400, 6001]  # the first file is large enough to be cut, the others are not
    files = [str(write_csv(folder / f"{k}.csv", rows[a:b])) for k, (a, b) in enumerate(pairwise(edges))]
    argv = [*files, "--lanes", "4", "--min-item-ratings", "90", "--max-rejected", "0.1"]
    assert ended([*argv, "--out", str(folder / "d")])[0] == 0
    return argv, content(folder / "d")


def started(stage: str, kind: str, folder: Path, argv: list[str], conf: str = "") -> subprocess.Popen[bytes]:
    """The job on two executors, with a stage that goes wrong; its words go to FOLDER/log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spark").mkdir(exist_ok=True)
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf/spark-defaults.conf").write_text(f"spark.driver.memory 1g\nspark.ui.enabled false\n{conf}")
    env = os.environ | {
        "PYTHONPATH": f"{HERE.parent}:{HERE}", "SPARK_LOCAL_DIRS": str(folder / "spark"),
        "SPARK_CONF_DIR": str(folder / "conf"), "SPARK_WORKER_DIR": str(folder / "spark"),
    }  # fmt: skip
    with (folder / "log").open("ab") as log:
        command = [sys.executable, str(HERE / "spark_faults.py"), stage, kind, str(folder), *argv, "--out",
                   str(folder / "d"), "--engine", "spark", "--spark-master", CLUSTER]  # fmt: skip
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)


def check(folder: Path, process: subprocess.Popen[bytes], expected: dict[str, bytes], turns: int) -> None:
    """It ends well after ``turns`` faults at least, with the bytes of one machine and no file more."""
    try:
        code = process.wait(1200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (folder / "log").read_text()[-5000:]
    found = content(folder / "d")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert len(list(folder.glob("turn-*"))) >= turns


@pytest.mark.parametrize("stage", STAGES)
def test_executors_that_are_killed_change_nothing(
    stage: str, source: tuple[list[str], dict[str, bytes]], tmp_path: Path
) -> None:
    check(tmp_path, started(stage, "kill", tmp_path, source[0]), source[1], 3)


@pytest.mark.parametrize("stage", STAGES)
def test_tasks_that_fail_twice_change_nothing(
    stage: str, source: tuple[list[str], dict[str, bytes]], tmp_path: Path
) -> None:
    check(tmp_path, started(stage, "fail", tmp_path, source[0]), source[1], 3)


def of_session(leader: int) -> list[str]:
    """What still runs of a program's session: its executors, their Python workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
    return found


SPECULATION = """spark.speculation true
spark.speculation.quantile 0.1
spark.speculation.multiplier 1.1
spark.speculation.interval 100ms
spark.speculation.minTaskRuntime 100ms
"""


@pytest.mark.parametrize("stage", ["read_task", "write_task"])
def test_speculative_attempts_change_nothing(
    stage: str, source: tuple[list[str], dict[str, bytes]], tmp_path: Path
) -> None:
    check(tmp_path, started(stage, "slow", tmp_path, source[0], SPECULATION), source[1], 3)


@pytest.mark.parametrize("stage", ["gather_task", "write_task"])
def test_a_killed_driver_leaves_no_dataset_and_the_same_command_makes_it(
    stage: str, source: tuple[list[str], dict[str, bytes]], tmp_path: Path
) -> None:
    process = started(stage, "tell", tmp_path, source[0])
    until = time.monotonic() + 300
    while not (tmp_path / "reached").exists():
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-5000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 120
    while of_session(process.pid):
        assert time.monotonic() < until, of_session(process.pid)
        time.sleep(0.5)
    assert not (tmp_path / "d/dataset.json").exists()
    assert {path.name for path in (tmp_path / "d").iterdir()} <= {".scratch"}
    check(tmp_path, started("none", "none", tmp_path, source[0]), source[1], 0)

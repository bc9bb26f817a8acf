"""recommend, predict and similar killed at random moments, again and again: the same bytes, and no file left over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset
from test_evaluate import write_run

KILLS = 6


class Jobs:
    """Jobs of a process that has imported all they need (``forked_jobs``)."""

    def __init__(self):
        command = [sys.executable, str(Path(__file__).with_name("forked_jobs.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *words):
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self):
        return int(self._process.stdout.readline())

    def close(self):
        self._process.communicate()
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def jobs():
    jobs = Jobs()
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 20,000 users and 500 items in 40 lanes, and 40 files of pairs."""
    folder = tmp_path_factory.mktemp("kills")
    write_run(folder / "run", make_dataset(folder / "data", rows=60_000, lanes=40, users=20_000, items=500))
    rng = np.random.default_rng(0)
    (folder / "pairs").mkdir()
    for k in range(40):
        rows = zip(rng.integers(0, 25_000, 5000), rng.integers(0, 500, 5000), strict=True)
        (folder / f"pairs/{k:02d}.csv").write_text("".join(f"u{u},i{i},3\n" for u, i in rows))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("job", "ending"),
    [("recommend", "parquet"), ("recommend", "csv"), ("predict", "parquet"), ("predict", "csv"), ("similar", "csv"),
     ("recommend --fold-in", "parquet")],
)  # fmt: skip
def test_killed_at_random_moments(tmp_path, jobs, folder, job, ending):
    moment = random.Random(f"{job} {ending}")
    job, *fold_in = job.split()
    flags = {"recommend": ["--device", "cpu"], "predict": [str(folder / "pairs")],
             "similar": ["--device", "cpu", "--side", "users"]}[job]  # fmt: skip
    flags += [*fold_in, str(folder / "pairs/00.csv")] if fold_in else []

    def start(out):
        return jobs.start(job, *flags, "--run-dir", str(folder / "run"), "--out", str(tmp_path / out / f"out.{ending}"))

    for out in ("whole", "killed"):
        (tmp_path / out).mkdir()
    for _ in range(2):  # the second is never the first of its job
        began = time.monotonic()
        start("whole")
        assert jobs.end() == 0
        seconds = time.monotonic() - began
    codes = []
    while len(codes) < KILLS:
        pid = start("killed")
        time.sleep(moment.uniform(0.1, 1) * seconds)
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(pid, moment.choice([signal.SIGKILL, signal.SIGTERM]))
        code = jobs.end()
        assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM)
        if code:
            codes.append(code)
        else:  # done before the signal came: begin anew
            os.unlink(tmp_path / f"killed/out.{ending}")
    start("killed")
    assert jobs.end() == 0
    assert os.listdir(tmp_path / "killed") == [f"out.{ending}"]
    whole, killed = ((tmp_path / out / f"out.{ending}").read_bytes() for out in ("whole", "killed"))
    assert killed == whole

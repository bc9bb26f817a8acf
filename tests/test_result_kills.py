"""recommend, predict and similar killed at random moments, again and again: the same bytes, and no file left over."""

from __future__ import annotations

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

ROOT = Path(__file__).parents[1]
KILLS = 8


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("job", "ending"),
    [("recommend", "parquet"), ("recommend", "csv"), ("predict", "parquet"), ("predict", "csv"), ("similar", "csv"),
     ("recommend --fold-in", "parquet")],
)  # fmt: skip
def test_killed_at_random_moments(tmp_path, job, ending):
    dataset = make_dataset(tmp_path / "data", rows=60_000, lanes=40, users=20_000, items=500)
    write_run(tmp_path / "run", dataset)
    rng, moment = np.random.default_rng(0), random.Random(f"{job} {ending}")
    (tmp_path / "pairs").mkdir()
    for k in range(40):
        rows = zip(rng.integers(0, 25_000, 20_000), rng.integers(0, 500, 20_000), strict=True)
        (tmp_path / f"pairs/{k:02d}.csv").write_text("".join(f"u{u},i{i},3\n" for u, i in rows))
    job, *fold_in = job.split()
    flags = {"recommend": ["--device", "cpu"], "predict": [str(tmp_path / "pairs")],
             "similar": ["--device", "cpu", "--side", "users"]}[job]  # fmt: skip
    flags += [*fold_in, str(tmp_path / "pairs/00.csv")] if fold_in else []

    def command(out):
        return [sys.executable, str(ROOT / f"jobs/{job}.py"), *flags, "--run-dir", str(tmp_path / "run"),
                "--out", str(tmp_path / out / f"out.{ending}")]  # fmt: skip

    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    began = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    seconds, kills = time.monotonic() - began, 0
    while kills < KILLS:
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment.uniform(0.3, 1) * seconds)
        number = moment.choice([signal.SIGKILL, signal.SIGTERM])
        process.send_signal(number)
        code = process.wait()
        assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM)
        kills += code != 0
        if code == 0:  # done before the signal came: begin anew
            os.unlink(tmp_path / f"killed/out.{ending}")
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert os.listdir(tmp_path / "killed") == [f"out.{ending}"]
    whole, killed = ((tmp_path / folder / f"out.{ending}").read_bytes() for folder in ("whole", "killed"))
    assert killed == whole

"""What a training says and records: its console word by word, the schema of metrics.jsonl, bars and their clock."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import snapshots
from datasets import make_dataset
from terminal import watch

from mfdist import compilation
from mfdist.cluster.world import World
from mfdist.errors import StopRequested
from mfdist.log import Console
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

SCHEMA = {
    "start": "epoch kind step time world_size",
    "resume": "epoch kind step time world_size",
    "compile": "epoch kind seconds step time",
    "interval": "epoch kind learning_rate memory_bytes ranks_wait_seconds ratings_per_second seconds step time "
                "train_rmse wait_seconds",
    "epoch": "epoch kind ratings_per_second seconds step stop_rmse time train_rmse val_mae val_mae_clipped val_rmse "
             "val_rmse_clipped validation_seconds",
    "checkpoint": "background_seconds bytes epoch kind pause_seconds step time",
    "stop": "epoch kind reason step time",
    "warning": "epoch kind step text time",
    "result": "epoch floors kind of_epoch step time val_mae_clipped val_rmse_clipped",
    "finish": "epoch kind step time wall_seconds",
}  # fmt: skip
"""Of metrics.jsonl: kind of a record -> its keys."""


@pytest.fixture(scope="module")
def stopped_and_finished(tmp_path_factory):
    """(what was said until the stop, what after it, the run): a run that was stopped at its first check."""
    folder = tmp_path_factory.mktemp("console")
    data = str(folder / "data")
    make_dataset(data, rows=6000, lanes=4, val_rows=600, users=300, items=60)
    config = TrainConfig(data=data, run_dir=str(folder / "run"), epochs=2, emb_dim=16, batch_size=500, device="cpu")
    (folder / "run").mkdir()
    (folder / "run/STOP").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jobs/train.py"])
        patch.setattr("mfdist.log.PATIENCE_SECONDS", 600.0)  # how long things take is no part of the picture
        said: list[str] = []
        patch.setattr(Console, "info", lambda _self, text: said.append(text))
        patch.setattr(Console, "warn", lambda _self, text: said.append(f"warning: {text}"))
        with pytest.raises(StopRequested):
            train(config, World.alone())
        before = list(said)
        said.clear()
        train(config, World.alone())
    return before, said, folder / "run"


def words(lines, run):
    """Without what depends on the machine, the folder and the time."""
    text = "\n".join(lines).replace(str(run), "RUN")
    text = re.sub(r"\d threads? each; [\d.]+ GiB", "N threads each; N GiB", text)
    text = re.sub(r"\d+\.\d s \+ \d+\.\d s to validate \| \d+\.\d+ M", "N s + N s to validate | N M", text)
    return re.sub(r"kernels compiled in \d+ s.*\n", "", text) + "\n"


def test_the_console_is_as_it_was_read(stopped_and_finished):
    before, after, run = stopped_and_finished
    snapshots.check("console-train.txt", words([*before, "--- the same command again", *after], run))


def records(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_have_the_schema(stopped_and_finished):
    found = records(stopped_and_finished[2])
    assert {"start", "stop", "resume", "interval", "epoch", "checkpoint", "result", "finish"} <= {
        r["kind"] for r in found
    }
    for record in found:
        assert " ".join(sorted(record)) == SCHEMA[record["kind"]], record["kind"]


def test_intervals_follow_each_other_without_gap_or_repetition(stopped_and_finished):
    """Each epoch's intervals end with its last step; a stop writes the one before its checkpoint."""
    found = records(stopped_and_finished[2])
    steps = [record["step"] for record in found if record["kind"] == "interval"]
    assert steps == sorted(set(steps)) and {1, 12, 24} <= set(steps)
    assert [r["step"] for r in found if r["kind"] == "epoch"] == [12, 24]


def test_compilation_is_no_part_of_rate_and_time_left(monkeypatch, capsys):
    spent = [0.0]
    monkeypatch.setattr("mfdist.log.PLAIN_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "seconds", lambda: spent[0])
    began = time.monotonic()
    with Console().progress("work", 1000, unit="rows") as progress:
        time.sleep(0.3)
        spent[0] = 0.2
        progress.advance(100)
        took = time.monotonic() - began
    rate = int(re.search(r"\| ([\d,]+) rows/s", capsys.readouterr().out)[1].replace(",", ""))
    assert rate > 100 / (took - 0.2) - 1  # 100 rows, and 0.2 s are left out


def test_progress_of_a_job_that_prints_its_result_goes_to_stderr(monkeypatch, capsys):
    monkeypatch.setattr("mfdist.log.PLAIN_INTERVAL_SECONDS", 0.0)
    with Console(aside=True).progress("work", 10, unit="parts") as progress:
        time.sleep(0.2)
        progress.advance(1)
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"work 10% \| \d\.\d\d parts/s \| eta", err)


def test_compiling_is_counted_and_said(tmp_path):
    """In a process of its own: whoever compiles first is told to wait."""
    code = """
import time
import mfdist.log as log
from mfdist import compilation
log.PLAIN_INTERVAL_SECONDS, log.REDRAW_SECONDS = 0.0, 0.01
import numba
with log.Console().progress("work", 10) as progress:
    @numba.njit
    def slow(x):
        for k in range(3):
            x += k
        return x
    slow(1.0)
    progress.advance(10)
assert compilation.seconds() > 0, compilation.seconds()
assert not compilation.under_way()
"""
    (tmp_path / "compiles.py").write_text(code)
    seen = watch([sys.executable, "compiles.py"], tmp_path)
    assert seen.code == 0, seen.text
    assert "compiling kernels, once a machine" in seen.text


@pytest.mark.parametrize("columns", [0, 40, 120])
def test_a_bar_shows_on_every_terminal(tmp_path, columns):
    """Some terminals, as those of containers, say that they have no columns."""
    code = """
import time
from mfdist.log import Console
with Console().progress("epoch 1/3", 1000) as progress:
    time.sleep(0.2)
    progress.advance(400, "rmse 0.9")
    time.sleep(1.3)
"""
    (tmp_path / "bar.py").write_text(code)
    seen = watch([sys.executable, "bar.py"], tmp_path, columns=columns)
    assert seen.code == 0 and "epoch 1/3:  40%" in seen.text
    assert max(len(line) for line in re.split(r"[\r\n]+", seen.text)) <= (columns or 80)

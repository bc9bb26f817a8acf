"""Trackers: the same figures as metrics.jsonl, once each, also after a stop; one that fails stops nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections import defaultdict

import pytest
import snapshots
from datasets import make_dataset

from mfdist.cluster.world import World
from mfdist.errors import StopRequested, UsageError
from mfdist.log import Console
from mfdist.training import trackers
from mfdist.training.config import TrainConfig
from mfdist.training.trackers import TAGS, Trackers, scalars
from mfdist.training.train import train


def test_tags_are_as_they_were_read():
    snapshots.check(
        "tracker-tags.txt", "\n".join(f"{kind} {tag}" for kind, tags in TAGS.items() for tag in tags) + "\n"
    )


@pytest.fixture
def data(tmp_path):
    path = str(tmp_path / "data")
    make_dataset(path, rows=6000, lanes=4, val_rows=600, users=300, items=60)
    return path


def train_with_a_stop(data, run, **flags):
    """Stopped at its first check, then finished; returns the records of metrics.jsonl that trackers take."""
    config = TrainConfig(data=data, run_dir=str(run), epochs=2, emb_dim=16, batch_size=500, device="cpu", **flags)
    run.mkdir()
    (run / "STOP").touch()
    with pytest.raises(StopRequested):
        train(config, World.alone(), Console(False))
    with open(run / "metrics.jsonl", "a") as stream:  # what a kill behind the checkpoint leaves
        stream.write(json.dumps({"kind": "epoch", "step": 7, "epoch": 1, "time": 0.0}) + "\n")
    train(config, World.alone(), Console(False))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def expected_of(records):
    found = defaultdict(list)
    for record in records:
        for tag, value in scalars(record):
            found[tag].append((record["step"], pytest.approx(value, rel=1e-6)))
    return dict(found)


def test_tensorboard_has_every_figure_once(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = train_with_a_stop(data, tmp_path / "run")
    accumulator = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    got = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }
    levels = {tag: points[1:] if tag.startswith("error/floor") else points for tag, points in got.items()}
    expected = expected_of(records)
    assert levels == {tag: expected[tag] for tag in levels} and set(expected) == set(levels)
    assert "error/val_rmse" in got and "speed/ratings_per_second" in got and "system/memory_gib" in got
    assert any("configuration" in tag for tag in accumulator.Tags()["tensors"])


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small tmpfs")
def test_tensorboard_on_a_full_disk_says_so_once_and_no_thread_dies(tmp_path):
    said: list[str] = []
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        feed = Trackers([trackers.TensorBoard(str(disk), {"lr": 0.1})], said.append)
        for step in range(3000):
            feed.record({"kind": "compile", "step": step, "seconds": 1.0, "time": 1.7e9})
        feed.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert len(said) == 1 and "TensorBoard failed" in said[0] and "No space left on device" in said[0], said


class Failing:
    name = "Failing"
    taken = 0

    def open(self) -> None: ...

    def take(self, record):
        self.taken += 1
        raise OSError("no route to host")

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_says_so_once():
    said: list[str] = []
    feed = Trackers([Failing()], said.append)
    for step in range(5):
        feed.record({"kind": "compile", "step": step, "seconds": 1.0})
    feed.close()
    assert len(said) == 1 and "Failing failed" in said[0] and "no route to host" in said[0]


def test_a_tracker_that_hangs_is_left(monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE_SECONDS", 0.2)
    said: list[str] = []

    class Hanging(Failing):
        name = "Hanging"

        def take(self, record):
            time.sleep(3)

    feed = Trackers([Hanging()], said.append)
    feed.record({"kind": "compile", "step": 1, "seconds": 1.0})
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 2 and len(said) == 1


@pytest.mark.parametrize("name", trackers.REMOTE)
def test_a_missing_library_is_said_before_anything(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=rf"pip install 'mfdist\[{name}\]'"):
        TrainConfig(track=name)


def test_weights_and_biases_goes_on_with_the_same_run(data, tmp_path, monkeypatch):
    """Its library's part is played: what it is asked, in the order of its documents (steps never go back)."""
    runs: dict[str, types.SimpleNamespace] = {}

    class Played:
        def __init__(self, name):
            self.id, self.step, self.logged = name, 0, []

        def log(self, values, step):
            assert step >= self.step, "Weights & Biases leaves such a step out"
            self.step = step
            self.logged.append((step, values))

        def finish(self):
            self.step += 1  # where a resumed run begins

    def init(project, name, config, id=None, resume=None):
        assert project == "mfdist" and config["epochs"] == 2 and (id is None or resume == "must")
        return runs.setdefault(id or "first", Played(id or "first"))

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    records = train_with_a_stop(data, tmp_path / "run", track="wandb")
    assert list(runs) == ["first"]
    got = defaultdict(list)
    for step, values in runs["first"].logged:
        for tag, value in values.items():
            got[tag].append((step, value))
    assert dict(got) == expected_of(records)


@pytest.fixture
def server(tmp_path):
    """The address of an MLflow server of this test."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port), "--backend-store-uri",
               f"sqlite:///{tmp_path}/mlflow.db", "--default-artifact-root", str(tmp_path / "artifacts")]  # fmt: skip
    less = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, **less}, start_new_session=True, **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None, "the server has ended"
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_figure_once(data, tmp_path, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    records = train_with_a_stop(data, tmp_path / "run", track="mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("mfdist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["emb-dim"] == "16"
    got = {tag: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag))
           for tag in run.data.metrics}  # fmt: skip
    assert got == expected_of(records)

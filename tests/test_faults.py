"""Kill it anywhere: after each fault the same command continues, and ends bitwise equal to the undisturbed run.

The whole matrix: ``scripts/test --slow tests/test_faults.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import pytest
from faulty_jobs import (
    HERE,
    ROOT,
    complete,
    log_of,
    small_dataset,
    start,
    wait_for_step,
    workers,
)
from fsspec.implementations.local import LocalFileSystem

from mfdist.cluster.world import World
from mfdist.errors import MfdistError
from mfdist.log import Console
from mfdist.process import STOP_SIGNALS
from mfdist.run import checkpoint
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)
MATRIX = [
    ("first step", 0, 1), ("first step", 1, 1), ("mid-step", 0, 23), ("mid-step", 1, 41), ("exchange", 0, 40),
    ("exchange", 1, 55), ("check", 0, 5), ("before shard", 0, 2), ("before shard", 1, 3), ("in shard", 0, 9),
    ("in shard", 1, 15), ("flush", 0, 2), ("flush", 1, 3), ("before metadata", 0, 2), ("before COMMIT", 0, 3),
    ("before COMMIT", 0, 4), ("prune", 0, 1), ("prune", 0, 2), ("evaluation", 0, 1), ("evaluation", 1, 2),
    ("export", 0, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_dataset(tmp_path_factory)


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The export of the undisturbed run on two ranks."""
    return complete(data, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("point", "rank", "count"), MATRIX, ids=lambda value: str(value).replace(" ", "-"))
def test_kill_at_a_named_point(data, expected, tmp_path, point, rank, count):
    run = tmp_path / "run"
    assert start(data, run, fault=f"{point} {rank} {count} {tmp_path}").wait(240) == 1
    assert (tmp_path / "fault").exists(), f"{point} was never reached"
    assert time.time() - (tmp_path / "fault").stat().st_mtime < 30  # a dead rank ends the others soon
    log = log_of(run)
    assert log.count("Root Cause") == 1 and "Signal 9 (SIGKILL)" in log.split("Root Cause")[1], log
    assert log.count("Traceback") == 0 and log.count("the contact to another rank of this job was lost") <= 1, log
    assert complete(data, run) == expected
    kept = [checkpoint.verify(checkpoint.folder_of(str(run), step)) for step in checkpoint.committed_steps(str(run))]
    assert kept and not any(kept)
    assert sorted(checkpoint.committed_steps(str(run))) == checkpoint.all_steps(str(run))


@pytest.mark.slow
def test_the_launcher_restarts_from_the_last_commit(data, expected, tmp_path):
    run = tmp_path / "run"
    fault = f"step 1 25 {tmp_path}"
    assert complete(data, run, fault=fault, launch=("--standalone", "--max-restarts=1")) == expected
    assert (tmp_path / "fault").exists() and "continuing at epoch 1, step " in log_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_after_a_kill_on_other_ranks(data, tmp_path, ranks):
    from safetensors.numpy import load_file

    whole, run = tmp_path / "whole", tmp_path / "run"
    complete(data, whole)
    assert start(data, run, fault=f"mid-step 1 41 {tmp_path}").wait(240) == 1
    complete(data, run, ranks)
    first, second = (load_file(path / "model/model.safetensors") for path in (whole, run))
    for name, one in first.items():
        assert ((one.astype("f8") - second[name]) ** 2).sum() <= 1e-10 * (one.astype("f8") ** 2).sum(), name


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "agent"])
def test_kill_from_outside(data, expected, tmp_path, whom):
    """A killed agent cannot stop its workers: they end by themselves, or the next start refuses to run beside them."""
    run = tmp_path / "run"
    process = start(data, run)
    wait_for_step(run, 9, process)
    victims = sorted(workers(process))
    os.kill(process.pid if whom == "agent" else victims[int(whom[-1])], signal.SIGKILL)
    process.wait(60)
    if whom == "agent":
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert complete(data, run) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_gives_75_and_the_rest_follows(data, expected, tmp_path, number):
    run = tmp_path / "run"
    process = start(data, run, flags=["--checkpoint-every=3"])
    wait_for_step(run, 3, process)
    process.send_signal(number)
    assert process.wait(60) == 75, log_of(run)
    assert log_of(run).count("run the same command again") == 1
    assert complete(data, run, flags=["--checkpoint-every=3"]) == expected


def config(data, run, **values):
    small = {"batch_size": 50, "epochs": 2, "emb_dim": 8, "lr": 0.01, "device": "cpu", "checkpoint_every": "9",
             "keep": 2}  # fmt: skip
    return TrainConfig.ready("vignette_mf_advanced", data=data, run_dir=str(run), **{**small, **values})


class FailingFS(LocalFileSystem):
    """A disk on which one write in twenty fails."""

    protocol = "failing"
    rng = random.Random(3)
    failed = 0

    def __init__(self, **options):
        super().__init__(**{**options, "auto_mkdir": True})

    def _open(self, path, mode="rb", **kwargs):
        if "w" in mode and FailingFS.rng.random() < 0.05:
            FailingFS.failed += 1
            raise OSError(5, "Input/output error", path)
        return super()._open(path, mode, **kwargs)


@pytest.mark.slow
def test_a_filesystem_that_fails_one_write_in_twenty(data, tmp_path):
    fsspec.register_implementation("failing", FailingFS, clobber=True)
    train(config(data, tmp_path / "whole"), World.alone(), QUIET)
    for number in range(5):
        c = config(data, f"failing://{tmp_path}/run{number}")
        for _ in range(300):
            with contextlib.suppress(MfdistError, OSError):
                train(c, World.alone(), QUIET)
                break
        else:
            raise AssertionError("300 starts are not enough")
        assert (tmp_path / "whole/model/model.safetensors").read_bytes() == (
            tmp_path / f"run{number}/model/model.safetensors"
        ).read_bytes()
    assert FailingFS.failed > 5


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small tmpfs")
def test_a_full_disk_is_a_sentence_and_the_same_command_continues_when_there_is_room(data, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", str(disk)], check=True)
    try:
        run = disk / "run"
        log = tmp_path / "log"
        assert start(data, run, log=log).wait(240) == 1, log.read_text()
        assert "No space left on device" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
        assert log.read_text().count("error:") == 1
        steps = checkpoint.committed_steps(str(run))
        assert all(checkpoint.verify(checkpoint.folder_of(str(run), step)) == [] for step in steps)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert complete(data, run, log=log) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_secret_is_found_nowhere(data, tmp_path, capfd):
    """In a URL: neither in the run directory nor in what is printed, failures included."""
    secret = "hunter2-not-to-be-seen"
    run = f"memory://user:{secret}@runs/secret?access_key={secret}"
    train(config(data, run, epochs=1), World.alone())
    train(config(data, run), World.alone())
    with pytest.raises(MfdistError) as caught:
        train(config(data, run, resume="never"), World.alone())
    memory = fsspec.filesystem("memory")
    content = b"".join(memory.cat_file(path) for path in memory.find("/") if "runs/secret" in path)
    assert len(content) > 100_000 and secret.encode() not in content
    printed = capfd.readouterr()
    assert "***" in printed.out and secret not in printed.out + printed.err + str(caught.value)


def test_metrics_are_cut_at_the_restored_step(data, tmp_path):
    c = config(data, tmp_path / "run", keep=99)
    train(c, World.alone(), QUIET)
    for step in checkpoint.committed_steps(c.run_dir)[2:]:
        shutil.rmtree(checkpoint.folder_of(c.run_dir, step))
    os.unlink(tmp_path / "run/report.json")
    with open(tmp_path / "run/metrics.jsonl", "a") as stream:
        stream.write('{"kind": "epoch", "step"')  # a kill in mid-line
    train(c, World.alone(), QUIET)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "checkpoint"]
    assert sorted(steps) == [9, 18, 27, 36, 45, 54, 60]
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [1, 2]


# At random ----------------------------------------------------------------------------------------


def rounds(data, folder, count, ranks):
    command = [sys.executable, str(HERE / "faulty_rounds.py"), data, str(folder), str(count), str(ranks), "7"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=ROOT, env=env)
    assert found.returncode == 0, found.stderr
    words = found.stdout.split()
    killed, finished, unequal = int(words[1]), int(words[3]), int(words[5])
    assert killed >= count and finished >= count // 20 and unequal == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "count"), [(1, 140), (2, 60)])
def test_random_kills(data, tmp_path, ranks, count):
    print(rounds(data, tmp_path, count, ranks))

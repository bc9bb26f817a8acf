"""Deadlines, and what a run says and keeps when its disk cannot be written any more."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from datasets import make_dataset

from mfdist.cluster.world import World
from mfdist.errors import StopRequested, exit_code_of, redact
from mfdist.log import Console
from mfdist.run import checkpoint
from mfdist.run.stopping import DEADLINE_MARGIN_SECONDS, StopWatch
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=1500, lanes=3, val_rows=200, users=150, items=60)
    return path


def config(data, run, **values):
    return TrainConfig.ready(
        "vignette_mf_advanced", data=data, run_dir=str(run), batch_size=100, epochs=2, emb_dim=8, device="cpu", **values
    )


def deadline_flags(monkeypatch, kind):
    """The flags of a run whose deadline is over as soon as it looks."""
    if kind == "minutes":
        return {"max_minutes": 1e-6}
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + DEADLINE_MARGIN_SECONDS - 1)))
    return {}


@pytest.mark.parametrize(
    ("kind", "words"), [("minutes", "--max-minutes 1e-06 are over"), ("slurm", "Slurm job's time")]
)
def test_a_deadline_gives_75_and_the_same_command_ends_equal(data, tmp_path, monkeypatch, kind, words):
    whole = train(config(data, tmp_path / "whole"), World.alone(), QUIET)
    values = deadline_flags(monkeypatch, kind)
    starts = 0
    with pytest.raises(StopRequested, match=words) as stopped:
        train(config(data, tmp_path / "run", **values), World.alone(), QUIET)
    assert stopped.value.exit_code == 75
    while starts < 40:  # a start whose time is over takes a step all the same: the job comes to its end
        starts += 1
        try:
            again = train(config(data, tmp_path / "run", **values), World.alone(), QUIET)
            break
        except StopRequested:
            pass
    assert 1 < starts <= 30
    assert [e["train_rmse"] for e in again["epochs"]] == [e["train_rmse"] for e in whole["epochs"]]
    first, second = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "run"))
    assert first == second


def test_a_deadline_that_is_far_or_unreadable_stops_nothing(monkeypatch):
    for value in (str(int(time.time()) + 3600), "Unknown", ""):
        monkeypatch.setenv("SLURM_JOB_END_TIME", value)
        with StopWatch(None, max_minutes=60) as watch:
            assert watch.reason() is None


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small tmpfs")
def test_a_disk_that_becomes_read_only_is_a_sentence_and_the_checkpoints_stand(data, tmp_path, capsys, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    whole = train(config(data, tmp_path / "whole", checkpoint_every="4"), World.alone(), QUIET)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
    try:
        c = config(data, disk / "run", checkpoint_every="4")
        commit = checkpoint.commit

        def then_read_only(folder, step, *rest):
            size = commit(folder, step, *rest)
            if step == 12:
                while subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False).returncode:
                    time.sleep(0.01)  # another thread has a file open
            return size

        monkeypatch.setattr(checkpoint, "commit", then_read_only)
        assert exit_code_of(lambda: 0 if train(c, World.alone(), QUIET) else 1) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Read-only file system" in said and len(said.splitlines()) == 1, said
        assert exit_code_of(lambda: 0 if train(c, World.alone(), QUIET) else 1) == 1
        assert "cannot be written (Read-only file system)" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert 12 in checkpoint.committed_steps(c.run_dir)
        again = train(c, World.alone(), QUIET)
        assert [e["train_rmse"] for e in again["epochs"]] == [e["train_rmse"] for e in whole["epochs"]]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/dir", "s3://bucket/dir"),
        ("s3://bucket/dir@v1", "s3://bucket/dir@v1"),
        ("s3://user:word@bucket/dir@v1", "s3://***@bucket/dir@v1"),
        ("s3://user:wo@rd@bucket/dir", "s3://***@bucket/dir"),
        ("s3://user:wo/rd@bucket/dir", "s3://***@bucket/dir"),
        ("ftp://host:21/dir@v1", "ftp://host:21/dir@v1"),
        ("az://c/d?sig=word&sv=1", "az://c/d?sig=***&sv=1"),
        ("x://c?pwd=word;auth_token=word", "x://c?pwd=***;auth_token=***"),
        ("/plain/path@2:3", "/plain/path@2:3"),
    ],
)
def test_what_is_shown_of_a_url(url, shown):
    assert redact(url) == shown
    assert redact(f"OSError: {url} is not there") == f"OSError: {shown} is not there"


def test_an_unexpected_error_shows_no_secret_either(capsys):
    def fail():
        raise RuntimeError("cannot open s3://user:word@bucket/dir")

    assert exit_code_of(fail) == 1

    def refuse():
        raise PermissionError(13, "Permission denied", "s3://user:word@bucket/dir")

    assert exit_code_of(refuse) == 1
    said = capsys.readouterr().err
    assert said.count("s3://***@bucket/dir") == 3 and "Traceback" in said  # the source line too
    assert "word" not in said

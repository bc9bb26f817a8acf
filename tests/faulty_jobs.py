"""The real launcher, and workers that meet a fault, for tests."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from datasets import make_dataset

from mfdist.run import checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parent
FLAGS = ["--config=vignette_mf_advanced", "--batch-size=50", "--epochs=2", "--emb-dim=8", "--lr=0.01", "--device=cpu",
         "--checkpoint-every=9", "--keep=2"]  # fmt: skip
STEPS = 30  # of an epoch


def small_dataset(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=50 * STEPS, lanes=5, val_rows=200, users=150, items=60, row_group=64)
    return path


def start(data, run, ranks=2, fault=None, flags=(), launch=("--standalone",), space=None, log=None, shell=(), way=""):
    """The real launcher with its workers; the log is a file, because killed agents leave pipes open."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0" if space else "lo"}
    env["MFDIST_TEST_WAY"] = way
    env.pop("MFDIST_TEST_FAULT", None)
    if fault:
        env["MFDIST_TEST_FAULT"] = fault
    command = [*shell, *(["ip", "netns", "exec", space] if space else []), sys.executable, "-m", "mfdist.launch",
               *launch, f"--nproc-per-node={ranks}", str(HERE / "faulty_train.py"), "--data", data,
               "--run-dir", str(run), *FLAGS, *flags]  # fmt: skip
    with open(log or f"{run}.log", "ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=stream, start_new_session=True)


def complete(data, run, ranks=2, **values):
    assert start(data, run, ranks, **values).wait(240) == 0, log_of(run)
    return Path(run, "model/model.safetensors").read_bytes()


def log_of(run):
    return Path(f"{run}.log").read_text()


def workers(agent):
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for_step(run, step, process, seconds=240.0):
    end = time.monotonic() + seconds
    while not any(done >= step for done in checkpoint.committed_steps(str(run))):
        assert time.monotonic() < end and process.poll() is None, log_of(run)
        time.sleep(0.01)


# Named points -------------------------------------------------------------------------------------

WIDE = ["--emb-dim=4096"]  # so that messages do not fit into what a connection holds


NUMBERS = itertools.count()

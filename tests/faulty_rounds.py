"""Many runs in forked processes, killed at random moments: python faulty_rounds.py DATA FOLDER ROUNDS RANKS SEED.

Prints one line: how many rounds ended in a kill, how many runs were finished, and how many of these were not equal
(bitwise, tables and losses) to the undisturbed run. Everything is imported and compiled once, before the first fork.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from mfdist.cluster.world import World
from mfdist.errors import MfdistError
from mfdist.log import Console
from mfdist.training.config import TrainConfig
from mfdist.training.train import train


def config(data: str, run: str) -> TrainConfig:
    return TrainConfig.ready(
        "vignette_mf_advanced",
        data=data, run_dir=run, batch_size=50, epochs=3, emb_dim=8, lr=0.01, device="cpu", checkpoint_every="7", keep=2,
        stop_fraction=0.1,
    )  # fmt: skip


def child(c: TrainConfig, rank: int, ranks: int, store: str) -> None:
    code = 1
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        if ranks == 1:
            train(c, World.alone(), Console(False))
        else:
            dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
            train(c, World(rank, ranks, torch.device("cpu"), connected=True), Console(False))
        code = 0
    except (MfdistError, RuntimeError) as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(c: TrainConfig, ranks: int, folder: str) -> list[int]:
    store = tempfile.mktemp(dir=folder)
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            child(c, rank, ranks, store)
        pids.append(pid)
    return pids


def reap(pids: list[int], seconds: float) -> list[int]:
    """Exit codes; processes that outlive ``seconds`` are a failure."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"ranks outlived a dead one by {seconds} s: {codes}")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def main(data: str, folder: str, rounds: int, ranks: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    train(config(data, f"{folder}/warm"), World.alone(), Console(False))
    began = time.monotonic()
    assert reap(start(config(data, f"{folder}/whole"), ranks, folder), 300) == [0] * ranks
    whole = time.monotonic() - began
    expected = Path(folder, "whole/model/model.safetensors").read_bytes()
    killed = finished = unequal = number = 0
    longest = 0.0
    while killed < rounds:
        c = config(data, f"{folder}/run{number}")
        pids = start(c, ranks, folder)
        time.sleep(rng.uniform(0.2, 1.0) * whole)
        victim = rng.choice(pids)
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        codes = reap(pids, 60)
        longest = max(longest, time.monotonic() - died)
        killed += -9 in codes
        if not any(codes) or Path(c.run_dir, "report.json").exists():
            codes = reap(start(c, ranks, folder), 60)
            finished += 1
            same = codes == [0] * ranks and Path(c.run_dir, "model/model.safetensors").read_bytes() == expected
            unequal += not same
            shutil.rmtree(c.run_dir)
            number += 1
    print(f"killed {killed} finished {finished} unequal {unequal} longest {longest:.1f} s after a kill")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))

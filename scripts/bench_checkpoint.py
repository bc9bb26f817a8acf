#!/usr/bin/env python
"""What checkpoints cost a training: the pause of one beside it, a synchronous one, and the time from SIGTERM to 75.

    python scripts/bench_checkpoint.py --data data/electronics [--ranks 1 2] [--folder DIR]

``synchronous``: the same checkpoint while the training stands still, until COMMIT is written, over an older one's
files. ``beside``: written while the training goes on, every --every steps; the first one is listed by itself, because
no older one's files are there (pages for it are made ahead). ``share`` is pause / synchronous. ``SIGTERM``: seconds
from the signal in mid-epoch until ``mfdist.launch`` has ended with 75.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mfdist.errors import StopRequested

ROOT = Path(__file__).resolve().parents[1]
SYNCHRONOUS = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--every", type=int, default=2000, help="steps between two checkpoints")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints beside the training")
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--folder", help="where the runs lie meanwhile (default: the temporary folder)")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--stand-still", help=argparse.SUPPRESS)  # what the ranks of the synchronous part do
    flags = parser.parse_args(argv)
    if flags.stand_still:
        return stand_still(flags)
    rows = []
    for ranks in flags.ranks:
        folder = Path(tempfile.mkdtemp("-checkpoints", dir=flags.folder))
        try:
            rows.append(measure(flags, ranks, folder))
        finally:
            shutil.rmtree(folder)
        print(line_of(rows[-1]), flush=True)
    if flags.json:
        Path(flags.json).write_text(json.dumps({"rows": rows}, indent=1))
    return 0


def measure(flags: argparse.Namespace, ranks: int, folder: Path) -> dict[str, Any]:
    still = folder / "still.json"
    subprocess.run(
        [*launcher(ranks), __file__, "--data", flags.data, "--batch-size", str(flags.batch_size), "--folder",
         str(folder / "still"), "--stand-still", str(still)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.rmtree(folder / "still")
    synchronous = json.loads(still.read_text())
    beside, stop = train_and_stop(flags, ranks, folder / "run")
    pauses = [record["pause_seconds"] for record in beside]
    usual = statistics.median(synchronous[2:])
    return {
        "system": "mfdist", "ranks": ranks, "bytes": beside[0]["bytes"], "synchronous_seconds": usual,
        "first_pause_seconds": pauses[0], "pause_seconds": statistics.median(pauses[1:]),
        "share": statistics.median(pauses[1:]) / usual, "sigterm_seconds": stop,
    }  # fmt: skip


def launcher(ranks: int) -> list[str]:
    return [sys.executable, "-m", "mfdist.launch", "--standalone", f"--nproc-per-node={ranks}"]


def train_and_stop(flags: argparse.Namespace, ranks: int, run: Path) -> tuple[list[dict[str, Any]], float]:
    """The records of the checkpoints beside a training, and the seconds from SIGTERM until it has ended."""
    command = [*launcher(ranks), "jobs/train.py", "--config", "vignette_mf_advanced",
               "--data", flags.data, "--run-dir", str(run), "--epochs", "1000",
               "--keep", "1", "--batch-size", str(flags.batch_size),
               "--checkpoint-every", str(flags.every)]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while len(records(run)) < flags.saves:
            if process.poll() is not None:
                raise SystemExit(f"the training ended with {process.returncode}")
            time.sleep(0.2)
        time.sleep(1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(300)
        stopped = time.monotonic() - began
    finally:
        process.kill()
    if code != StopRequested.exit_code:
        raise SystemExit(f"the training ended with {code} after SIGTERM")
    return records(run)[: flags.saves], stopped


def records(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == "checkpoint"]


def stand_still(flags: argparse.Namespace) -> int:
    """In the ranks: seconds of checkpoints that nothing goes on beside."""
    from mfdist.cluster.world import World
    from mfdist.data.dataset import Dataset
    from mfdist.data.loader import Loader
    from mfdist.log import Console
    from mfdist.training.config import TrainConfig
    from mfdist.training.session import build, restore_or_initialise, save, wait_for_save

    config = TrainConfig.ready(
        "vignette_mf_advanced", data=flags.data, run_dir=flags.folder, batch_size=flags.batch_size, keep=1, device="cpu"
    )
    dataset = Dataset.open(flags.data)
    with World.open("cpu") as world, Loader(
        dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size
    ) as loader:  # fmt: skip
        session = build(config, dataset, world, Console(False), loader)
        restore_or_initialise(session)
        seconds = []
        for step in range(1, SYNCHRONOUS + 2):
            session.progress.step = step
            world.barrier()
            began = time.monotonic()
            save(session)
            wait_for_save(session)
            seconds.append(time.monotonic() - began)
        session.saver.close()
        if session.fused:
            session.fused.close()
        if world.is_main:
            Path(flags.stand_still).write_text(json.dumps(seconds))
    return 0


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['ranks']} ranks, {row['bytes'] / 1e9:.2f} GB: synchronous {row['synchronous_seconds']:.2f} s; beside "
        f"the training: first pause {row['first_pause_seconds']:.2f} s, others {row['pause_seconds']:.2f} s, "
        f"{row['share']:.1%} of a synchronous one; SIGTERM to 75: {row['sigterm_seconds']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())

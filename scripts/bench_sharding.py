#!/usr/bin/env python
"""Where tables should lie: cut by rows or whole on each rank, in M ratings/s of training on several ranks of this host.

    python scripts/bench_sharding.py --data data/ml-1m --data data/ml-100k     # without --data: the built-in dataset
    python scripts/bench_sharding.py --data data/ml-1m --ranks 4 --batch 8192

``row``: tables cut by rows, item rows through memory that the ranks share; ``row, hosts``: the same by sockets, as
between hosts (here over loopback: no wire is slower to answer, but all are narrower); ``row, group``: by the process
group, where there can be no connections; ``replicated``: whole tables that DistributedDataParallel reduces. Each trains
in turn, and the best epoch after the first one counts. ``--sharding auto`` is what this found: ``row`` at every size on
CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.log import Console
from mfdist.run.directory import BUILTIN
from mfdist.synthetic.builtin import make_builtin
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "row": ("row", True, True), "row, hosts": ("row", False, True), "row, group": ("row", False, False),
    "replicated": ("replicated", True, True),
}  # fmt: skip
EPOCHS = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", help="a prepared dataset; may be given again")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of this host (default %(default)s)")
    parser.add_argument("--batch", default="1024,8192,65536", help="batch sizes (default %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    sizes = [int(size) for size in flags.batch.split(",")]
    if flags.worker:
        measure(flags.data, sizes)
        return 0
    data = [os.path.abspath(path) for path in flags.data or [BUILTIN]]
    if not flags.data and not Path(BUILTIN, "dataset.json").exists():
        make_builtin(BUILTIN)
    launch = [sys.executable, "-m", "mfdist.launch", "--standalone", f"--nproc-per-node={flags.ranks}", __file__]
    options = ["--worker", "--batch", flags.batch, *[word for path in data for word in ("--data", path)]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*launch, *options], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    print(
        f"{flags.ranks} ranks\n{'ratings':>12}{'users':>11}{'items':>10}{'batch':>8}"
        + "".join(f"{w:>12}" for w in WAYS)
    )
    for row in rows:
        rates = "".join(f"{row['rates'][way] / 1e6:12.3f}" for way in WAYS)
        print(f"{row['rows']:12,}{row['users']:11,}{row['items']:10,}{row['batch_size']:8,}{rates}")
    if flags.json:
        Path(flags.json).write_text(json.dumps({"machine": {"cores": os.cpu_count()}, "rows": rows}, indent=1) + "\n")
    return 0


def measure(paths: Sequence[str], sizes: Sequence[int]) -> None:
    """Every dataset and batch size, each way; rank 0 prints a line of JSON for each."""
    with World.open("cpu") as world, tempfile.TemporaryDirectory() as folder:
        for path in paths:
            manifest = Dataset.open(path).manifest
            for size in sizes:
                rates = {way: rate(world, path, size, way, f"{folder}/{size}-{way}") for way in WAYS}
                if world.is_main:
                    print(json.dumps({
                        "rows": manifest.num_ratings["train"], "users": manifest.num_users, "items": manifest.num_items,
                        "batch_size": size, "ranks": world.size, "rates": rates,
                    }), flush=True)  # fmt: skip


def rate(world: World, path: str, size: int, way: str, run: str) -> float:
    """Ratings/s of the best epoch but the first; collective."""
    sharding, world.may_share, world.may_connect = WAYS[way]
    run = world.broadcast(run)
    config = TrainConfig.ready("vignette_mf_advanced", data=path, run_dir=run,
                                batch_size=size, epochs=EPOCHS, device="cpu", sharding=sharding,
                         checkpoint_every="60m", overwrite=True)  # fmt: skip
    report = train(config, world, Console(False))
    assert report is not None
    return float(max(epoch["ratings_per_second"] for epoch in report["epochs"][1:]))


if __name__ == "__main__":
    sys.exit(main())

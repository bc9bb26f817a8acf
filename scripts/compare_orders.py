#!/usr/bin/env python
"""Does the order of the batches cost accuracy? The same training in three orders, over several seeds.

    python jobs/prepare.py ml-1m.parquet --out data/random
    python jobs/prepare.py ml-1m.parquet --out data/blocks --order blocks
    python scripts/compare_orders.py data/random data/blocks [--epochs 10] [--lr 0.005] [--batch-size 8192]

"uniform" is the first dataset with one random permutation of all training rows an epoch, held in memory; the others
come as the loader gives them. Printed: validation RMSE of the last epoch by seed, mean and spread, training ratings/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from mfdist.cluster.world import World
from mfdist.data.loader import Batch, Loader
from mfdist.training import train as training
from mfdist.training.config import TrainConfig


class UniformLoader(Loader):
    """The loader's rows in one permutation of the whole epoch, world size 1."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        batches = list(super().epoch(0))
        user, item, rating = (torch.cat([getattr(b, name) for b in batches]) for name in ("user", "item", "rating"))
        order = torch.randperm(len(user), generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        for step in range(start_step, self.num_steps):
            rows = order[step * self.order.batch_size : (step + 1) * self.order.batch_size]
            yield Batch(user[rows], item[rows], rating[rows], step, len(rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", help="prepared datasets; the first also gives the uniform order")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=5)
    flags = parser.parse_args(argv)
    systems = [("uniform", flags.data[0], UniformLoader), *((path, path, Loader) for path in flags.data)]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in systems}
    for seed in range(flags.seeds):
        for name, data, loader in systems:
            results[name].append(_train(data, loader, seed, flags))
    for name, runs in results.items():
        errors = [rmse for rmse, _ in runs]
        print(
            f"{name:32} rmse {statistics.mean(errors):.5f} +- {statistics.stdev(errors):.5f}  "
            f"{statistics.median(rate for _, rate in runs) / 1e6:.2f} M ratings/s  "
            + " ".join(f"{rmse:.5f}" for rmse in errors)
        )
    return 0


def _train(data: str, loader: type[Loader], seed: int, flags: argparse.Namespace) -> tuple[float, float]:
    """Validation RMSE of the last epoch and the median epoch's training ratings a second."""
    training.Loader = loader  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as run:
        config = TrainConfig.ready(
            "vignette_mf_advanced",
            data=data,
            run_dir=f"{run}/run",
            seed=seed,
            epochs=flags.epochs,
            lr=flags.lr,
            batch_size=flags.batch_size,
        )
        start = time.perf_counter()
        report = training.train(config, World.alone())
        assert report is not None
        print(f"{data} {loader.__name__} seed {seed}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rates = [epoch["ratings_per_second"] for epoch in report["epochs"]]
        return report["final"]["val_rmse"], statistics.median(rates)


if __name__ == "__main__":
    sys.exit(main())

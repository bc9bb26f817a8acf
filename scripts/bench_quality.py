#!/usr/bin/env python
"""Seconds from prepared data to the accuracy of Surprise's SVD, beside Surprise and LIBMF, in one run.

    python scripts/bench_quality.py --data data/ml-1m --data data/core164k [--rounds 3] [--json FILE]

The clock runs while a system learns: data in memory, kernels compiled (each of ours trains once before). ``whole``
is its process from start to end, reading, evaluation and export included. The target is the RMSE, clipped to the
scale, that Surprise's SVD with its defaults reaches on the dataset's validation rows in the same round; seconds to the
target are those of the first epoch that reaches it, of the shortest schedule given (ours: --config, LIBMF: its own
epochs). Rounds go through all systems in turn; the table shows medians. LIBMF lives in an environment of its own under
``.peers`` and is named as absent where it cannot be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers import ROOT, PeerAbsent, columns_of, environment

from mfdist.baseline.svd import fit
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.log import Console
from mfdist.results.floors import lane_rows
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

Row = dict[str, Any]

LIBMF = """
import sys, time, numpy as np, pyarrow.parquet as pq
import libmf.mf as mf
low, high, threads = float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
train, val = (
    np.ascontiguousarray(np.stack([t[c].to_numpy().astype("f4") for c in ("user", "item", "rating")], 1))
    for t in map(pq.read_table, sys.argv[1:3]))
for epochs in (1, 2, 3, 4, 6, 8, 10, 14, 20):
    engine = mf.MF(k=64, nr_iters=epochs, nr_threads=threads, quiet=True, lambda_p1=0, lambda_q1=0, lambda_p2=0.05,
                   lambda_q2=0.05, eta=0.1)
    began = time.perf_counter()
    engine.fit(train)
    seconds = time.perf_counter() - began
    user, item = val[:, 0].astype(int), val[:, 1].astype(int)
    p, q = engine.p_factors(), engine.q_factors()
    known = (user < len(p)) & (item < len(q))
    found = np.full(len(val), train[:, 2].mean())
    found[known] = (p[user[known]] * q[item[known]]).sum(1)
    found = np.clip(np.where(np.isfinite(found), found, train[:, 2].mean()), low, high)
    print("result", epochs, seconds, float(np.sqrt(np.mean((found - val[:, 2]) ** 2))))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", action="append", required=True, help="a prepared dataset; may be given again")
    parser.add_argument("--config", default=str(ROOT / "mfdist/configs/quick.toml"), help="our configuration")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the results here")
    flags = parser.parse_args(argv)
    rows: list[Row] = []
    for path in flags.data:
        dataset = Dataset.open(path)
        with tempfile.TemporaryDirectory() as folder:
            ours(dataset, flags, folder)  # compiles
            rounds = [one_round(dataset, flags, folder) for _ in range(flags.rounds)]
        rows += [median_of([found[k] for found in rounds]) for k in range(len(rounds[0]))]
    print_table(rows)
    if flags.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def one_round(dataset: Dataset, flags: Any, folder: str) -> list[Row]:
    target = surprise(dataset)
    found = [target, ours(dataset, flags, folder), *libmf(dataset, flags, folder)]
    for row in found:
        reached = [seconds for seconds, rmse in row.pop("curve") if rmse <= target["rmse"] + 1e-9]
        row["seconds_to_target"] = min(reached) if reached else None
    return found


def _row(dataset: Dataset, system: str, curve: list[tuple[float, float]], whole: float) -> Row:
    best = min(curve, key=lambda point: point[1])
    return {"dataset": dataset.path, "system": system, "rmse": best[1], "seconds": best[0], "whole": whole,
            "curve": curve, "device": "cpu"}  # fmt: skip


def surprise(dataset: Dataset) -> Row:
    """SVD() with its defaults, as the baseline job fits it: the clock is that of its epochs."""
    began = time.perf_counter()
    model = fit(dataset, factors=100, epochs=20, seed=0)
    learned = time.perf_counter() - began
    low, high = dataset.manifest.rating_scale
    squares, count = 0.0, 0
    for lane in range(len(dataset.manifest.lanes)):
        for user, item, rating in lane_rows(dataset, "val", lane):
            error = np.clip(model.predict(user, item), low, high) - rating
            squares, count = squares + float(error @ error), count + len(error)
    return _row(dataset, "Surprise SVD", [(learned, (squares / count) ** 0.5)], time.perf_counter() - began)


def ours(dataset: Dataset, flags: Any, folder: str) -> Row:
    arguments = ["--config", flags.config, "--data", dataset.path, "--run-dir", f"{folder}/run", "--overwrite",
                 "--checkpoint-every", "60m"]  # fmt: skip
    began = time.perf_counter()
    report = train(parse_config(TrainConfig, arguments, "quality"), World.alone(), Console(speaks=False))
    whole = time.perf_counter() - began
    assert report is not None
    learned = sum(epoch["seconds"] for epoch in report["epochs"])
    return _row(dataset, f"mfdist, {Path(flags.config).stem}", [(learned, report["final"]["val_rmse_clipped"])], whole)


def libmf(dataset: Dataset, flags: Any, folder: str) -> list[Row]:
    paths = []
    for split in ("train", "val"):
        columns = columns_of(dataset, split)
        order = np.random.default_rng(0).permutation(len(columns["user"]))
        paths.append(f"{folder}/{split}.parquet")
        pq.write_table(pa.table({name: column[order] for name, column in columns.items()}), paths[-1])
    try:
        python = environment("libmf", ["libmf", "numpy", "pyarrow"])
    except PeerAbsent as error:
        print(f"LIBMF is absent, {error}", file=sys.stderr)
        return []
    arguments = [*paths, *dataset.manifest.rating_scale, flags.threads]
    began = time.perf_counter()
    result = subprocess.run([str(python), "-c", LIBMF, *map(str, arguments)], check=True, capture_output=True,
                            text=True)  # fmt: skip
    points = [line.split()[2:] for line in result.stdout.splitlines() if line.startswith("result")]
    return [_row(dataset, "LIBMF", [(float(s), float(e)) for s, e in points], time.perf_counter() - began)]


def median_of(rounds: list[Row]) -> Row:
    """The median round by each figure."""
    found = dict(rounds[0])
    for key in ("rmse", "seconds", "whole", "seconds_to_target"):
        values = [row[key] for row in rounds if row[key] is not None]
        found[key] = statistics.median(values) if values else None
    return found


def print_table(rows: list[Row]) -> None:
    print(f"{'dataset':28} {'system':18} {'best RMSE':>9} {'s to it':>8} {'s to SVD':>9} {'of SVD':>7} {'whole s':>8}")
    for row in rows:
        svd = next(r for r in rows if r["dataset"] == row["dataset"] and r["system"] == "Surprise SVD")
        reached = row["seconds_to_target"]
        shown = f"{reached:9.2f} {reached / svd['seconds_to_target']:7.3f}" if reached else f"{'never':>9} {'':7}"
        print(f"{row['dataset'][-28:]:28} {row['system']:18} {row['rmse']:9.4f} {row['seconds']:8.2f} {shown} "
              f"{row['whole']:8.2f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Users whom training did not know, folded in, beside the same users trained with; and how fast they are solved.

    python scripts/bench_fold_in.py --data ml-1m                 # a file of ratings, or a name under MFDIST_TEST_DATA
    python scripts/bench_fold_in.py --data ratings.csv --config quick --json fold_in.json

A tenth of the users is held out: one model is trained on everybody, one on the others alone. Both predict the held-out
users' validation rows, the second with `--fold-in` of their training rows. Splits go by a hash of the pair, so they
are the same for both. Rates are of one thread, for the first --timed users, with the ratings that they have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mfdist.data.dataset import Dataset
from mfdist.results.exported_model import ExportedModel
from mfdist.results.fold_in import FoldIn
from mfdist.results.folded_model import ratings_of

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("user_id", "item_id", "rating")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-1m", help="file of ratings, or NAME.parquet under MFDIST_TEST_DATA")
    parser.add_argument("--config", default="recipe", help="configuration of the trainings (default %(default)s)")
    parser.add_argument("--timed", type=int, default=2000, help="users solved for the rate (default %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(flags, Path(folder))
    print(f"{flags.data}, {flags.config}, {row['users']:,} held-out users, {row['rows']:,} validation rows of theirs")
    print(f"{'':28}{'RMSE':>8}")
    for name in ("trained with", "folded in", "unknown"):
        print(f"{name:28}{row[name]:8.4f}")
    print(f"folded in / trained with: {row['folded in'] / row['trained with']:.4f}")
    print(f"{row['users_per_second']:,.0f} users/s of one thread, {row['ratings_per_user']:.0f} ratings a user")
    if flags.json:
        Path(flags.json).write_text(json.dumps({"machine": {"cores": os.cpu_count()}, "rows": [row]}, indent=1) + "\n")
    return 0


def measure(flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    named = Path(os.environ.get("MFDIST_TEST_DATA", ".")) / f"{flags.data}.parquet"
    source = str(named if named.exists() else flags.data)
    job("prepare", source, "--out", folder / "all")
    dataset = Dataset.open(str(folder / "all"))
    rng = np.random.default_rng(0)
    held = np.sort(rng.choice(dataset.manifest.num_users, dataset.manifest.num_users // 10, replace=False))
    train, val = (rows_of(dataset, split) for split in ("train", "val"))
    mine = pl.col("user").is_in(held)
    train.filter(mine).select(COLUMNS).write_csv(folder / "new.csv")
    val.filter(mine).select(COLUMNS).write_csv(folder / "asked.csv")
    train.filter(~mine).select(COLUMNS).write_csv(folder / "others.csv")
    val.filter(~mine).select(COLUMNS).write_csv(folder / "others_val.csv")
    job("prepare", folder / "others.csv", "--val", folder / "others_val.csv", "--out", folder / "others")
    runs = {name: folder / f"{name}.run" for name in ("all", "others")}
    for name, run in runs.items():
        job("train", "--data", folder / name, "--run-dir", run, "--config", flags.config, "--device", "cpu")
    asked = [folder / "asked.csv", "--out", folder / "scored.parquet", "--run-dir"]
    rated = train.filter(mine).height / len(held)
    return {
        "system": "mfdist", "algorithm": f"fold-in, {flags.config}", "exact": True, "device": "cpu", "threads": 1,
        "users": len(held), "rows": val.filter(mine).height, "ratings_per_user": rated,
        "trained with": rmse_of(job("predict", *asked, runs["all"])),
        "folded in": rmse_of(job("predict", *asked, runs["others"], "--fold-in", folder / "new.csv")),
        "unknown": rmse_of(job("predict", *asked, runs["others"])),
        "users_per_second": rate(dataset, str(runs["all"]), held[: flags.timed]),
    }  # fmt: skip


def rows_of(dataset: Dataset, split: str) -> pl.DataFrame:
    """Rows with original ids, and the user's row number."""
    rows = pl.read_parquet(f"{dataset.path}/{split}/*.parquet", columns=["user", "item", "rating"])
    for side in ("user", "item"):
        ids = pl.read_parquet(f"{dataset.path}/{side}s.parquet", columns=["row", "id"]).rename({"id": f"{side}_id"})
        rows = rows.with_columns(pl.col(side).cast(pl.Int64)).join(ids, left_on=side, right_on="row")
    return rows


def rate(dataset: Dataset, run: str, users: Any) -> float:
    """Users a second of one thread, ratings in memory."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    solver, lists = FoldIn(ExportedModel.open(run)), []
    for lane, about in enumerate(dataset.manifest.lanes):
        chosen = np.concatenate([users[(users >= first) & (users < end)] for first, end in about.user_ranges])
        if len(chosen):
            items, ratings = ratings_of(dataset, lane, chosen)
            lists += [(items.items[a:b], ratings[a:b].astype(np.float64))
                      for a, b in zip(items.starts[:-1], items.starts[1:], strict=True)]  # fmt: skip
    began = time.perf_counter()
    for one in lists:
        solver.solve(*one)
    return len(lists) / (time.perf_counter() - began)


def rmse_of(text: str) -> float:
    found = re.search(r"RMSE ([\d.]+)", text)
    assert found, text
    return float(found[1])


def job(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / f"jobs/{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

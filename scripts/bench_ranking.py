#!/usr/bin/env python
"""Lists of ten by --config ranking, implicit's ALS and plain popularity, on the same split and by the same rule.

    MFDIST_TEST_DATA=FOLDER python scripts/bench_ranking.py
    python scripts/bench_ranking.py --files FOLDER --data core164k --seeds 1 --json F

Splits are those of scripts/leaderboard.py, figures those of ``mfdist.results.ranking`` on all users with a validation
rating from 4 on. implicit learns the same training rows with its defaults, each a one (``ones``) or its rating as the
confidence (``ratings``), with 32, 64 and 128 factors. Seconds are those of fitting, after one epoch to compile.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # implicit asks for it

import numpy as np
from leaderboard import datasets_in, prepared

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.log import Console
from mfdist.results.item_index import ItemIndex
from mfdist.results.ranking import rank_metrics, ranked_users
from mfdist.results.ranking_metrics import FIGURES
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

Factors = tuple[Any, Any]
ALL = 10**9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default=os.environ.get("MFDIST_TEST_DATA"), help="folder of the rating files")
    parser.add_argument("--data", default="ml-1m,core164k", help="datasets, with commas between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default="build/leaderboard", help="prepared datasets are kept here")
    parser.add_argument("--json", help="write the results here")
    flags = parser.parse_args(argv)
    names = flags.data.split(",")
    found = datasets_in(Path(flags.files)) if flags.files else {}
    if not flags.files or set(names) - set(found):
        parser.error(f"give --files or MFDIST_TEST_DATA, and --data of {', '.join(found) or 'its datasets'}.")
    rows = [row for name in names for row in measured(name, prepared(name, found[name], flags).dataset, flags.seeds)]
    print(
        f"{'dataset':<10}{'system':<30}{'seed':>5}" + "".join(f"{text:>13}" for text in (*FIGURES.values(), "seconds"))
    )
    for row in rows:
        figures = "".join(f"{row[key]:13.4f}" for key in FIGURES)
        print(f"{row['data']:<10}{row['system']:<30}{row['seed']:>5}{figures}{row['seconds']:13.2f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    return 0


def measured(name: str, dataset: Dataset, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each system and seed."""
    world = World.alone()
    users = ranked_users(dataset, world, ALL)
    popularity = None
    for seed in range(seeds):
        for system, (factors, seconds) in fitted(dataset, seed):
            found = rank_metrics(Lists(*factors), users, dataset, world)
            popularity = found.pop("popularity")
            yield {"data": name, "system": system, "seed": seed, "seconds": seconds, **found}
    yield {"data": name, "system": "most popular items", "seed": 0, "seconds": 0.0, **(popularity or {})}


def fitted(dataset: Dataset, seed: int) -> Iterator[tuple[str, tuple[Factors, float]]]:
    yield "mfdist --config ranking", ours(dataset, seed)
    if importlib.util.find_spec("implicit") is None:
        print("implicit is left out: pip install implicit")
        return
    for form in ("ones", "ratings"):
        for factors in (32, 64, 128):
            yield f"implicit ALS {factors}, {form}", implicit(dataset, seed, factors, form)


def ours(dataset: Dataset, seed: int) -> tuple[Factors, float]:
    from mfdist.results.exported_model import ExportedModel

    with tempfile.TemporaryDirectory() as folder:
        runs = [TrainConfig.ready("ranking", data=dataset.path, run_dir=f"{folder}/{name}", seed=seed, **values)
                for name, values in (("first", {"epochs": 1}), ("run", {}))]  # fmt: skip
        reports = [train(run, World.alone(), Console(False)) for run in runs]
        model = ExportedModel.open(f"{folder}/run")
        factors = np.array(model.user_embedding), np.array(model.item_embedding)
        assert reports[1] is not None
        return factors, sum(epoch["seconds"] for epoch in reports[1]["epochs"])


def implicit(dataset: Dataset, seed: int, factors: int, form: str) -> tuple[Factors, float]:
    from implicit.als import AlternatingLeastSquares
    from scipy import sparse

    manifest = dataset.manifest
    parts = [(user, item, rating) for _, user, item, rating, _ in scan(dataset, "train", range(len(manifest.lanes)))]
    user, item, rating = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    values = np.ones(len(rating), np.float32) if form == "ones" else rating
    matrix = sparse.csr_matrix((values, (user, item)), shape=(manifest.num_users, manifest.num_items))
    model = AlternatingLeastSquares(factors=factors, random_state=seed)
    began = time.perf_counter()
    model.fit(matrix, show_progress=False)
    return (model.user_factors, model.item_factors), time.perf_counter() - began


class Lists:
    """The best items by inner product: a ``ranking.Top``."""

    def __init__(self, users: Any, items: Any) -> None:
        self.users = np.ascontiguousarray(users, np.float32)
        self.index = ItemIndex(np.ascontiguousarray(items, np.float32), None)

    def __call__(self, users: Any, k: int, hidden: Any) -> Any:
        return self.index.search(self.users[users], k, hidden)[0]


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""Search for the recipe, one setting after the other, on training rows alone.

    MFDIST_TEST_DATA=FOLDER python scripts/search_recipe.py
    python scripts/search_recipe.py --files FOLDER --data ml-100k-u1,core164k --keys implicit,l2 --work build/search

The data and splits are those of scripts/leaderboard.py, but its validation rows are dropped first: a fifth of each
dataset's training rows, by a seed, is what the search sees its error on. Where the validation rows are a predefined
file, which thins out some users only (ML-100K u1: about half of them lose two fifths of their rows), two fifths of the
rows of a quarter of the users are taken instead, in --folds different ways.

From --config on, each key's values are tried in turn with all else as it stands; the best stays where its score is
better by --gain. The score of a setting is the mean over the datasets of its RMSE over that of the start. Every
training that is done is a line of WORK/trials.jsonl, so that the search can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from leaderboard import datasets_in, divide, read_ratings
from peers import job

from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.log import Console
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROW_L2 = (6.0, 4.5, 5.0, 6.5, 8.0, 35.0)


def row_l2(factors: float = 1.0, biases: float = 1.0, scales: float = 1.0) -> list[float]:
    """--row-l2 with its three pairs of numbers multiplied."""
    return [
        round(float(value * times), 3)
        for value, times in zip(ROW_L2, np.repeat([factors, biases, scales], 2), strict=True)
    ]


SPACE: dict[str, Sequence[Any]] = {
    "implicit": (0.0, 0.15, 0.2, 0.25, 0.3, 0.5),
    "l2": ([0.01, 0.0], [0.02, 0.0], [0.03, 0.0], [0.04, 0.0]),
    "row-l2": (row_l2(), row_l2(factors=0.7), row_l2(factors=1.4), row_l2(biases=0.8), row_l2(biases=1.2),
               row_l2(scales=0.5), row_l2(scales=2)),
    "emb-dim": (96, 128, 192),
    "init-std": (0.15, 0.3, 0.6),
    "lr": (0.015, 0.02, 0.03),
    "epochs": (30, 40, 50),
}  # fmt: skip
"""What is tried, in this order."""
Settings = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default=os.environ.get("MFDIST_TEST_DATA"), help="folder of the rating files")
    parser.add_argument("--data", default="", help="datasets, with commas between them; not given: all in the folder")
    parser.add_argument("--config", default="mfdist/configs/recipe.toml", help="where the search starts")
    parser.add_argument("--keys", default=",".join(SPACE), help="settings to search")
    parser.add_argument("--folds", type=int, default=3, help="inner splits of a dataset with a predefined split")
    parser.add_argument("--gain", type=float, default=1e-4, help="smallest relative gain that changes a setting")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inner splits and of training")
    parser.add_argument("--work", default="build/search", help="inner datasets and finished trainings")
    flags = parser.parse_args(argv)
    there = datasets_in(Path(flags.files)) if flags.files else {}
    names, keys = flags.data.split(",") if flags.data else list(there), flags.keys.split(",")
    if not names or set(names) - set(there) or set(keys) - set(SPACE):
        parser.error("give --files or MFDIST_TEST_DATA, --data and --keys of those that --help shows.")
    work = Path(flags.work).resolve()
    splits = {name: inner_splits(name, there[name], work, flags) for name in names}
    settings: Settings = tomllib.loads(Path(flags.config).read_text())
    trials = Trials(work / "trials.jsonl", flags.seed)
    start = {name: trials.error(settings, paths) for name, paths in splits.items()}
    print("start:", shown(start), flush=True)
    best = 1.0
    for key in keys:
        for value in SPACE[key]:
            tried = {**settings, key: value}
            found = {name: trials.error(tried, paths) for name, paths in splits.items()}
            score = float(np.mean([found[name] / start[name] for name in names]))
            better = score < best - flags.gain
            print(f"{key} = {value}: {score:.5f} {shown(found)}{' <- kept' if better else ''}", flush=True)
            if better:
                settings, best = tried, score
    print(f"\nscore {best:.5f} of the start's")
    print("\n".join(f"{key} = {json.dumps(settings[key])}" for key in SPACE if key in settings))
    return 0


def shown(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.4f}" for name, error in errors.items())


def inner_splits(name: str, files: Sequence[str], work: Path, flags: Any) -> list[str]:
    """Prepared datasets of the training rows of ``name``, some of them held out."""
    train, _ = divide([read_ratings(Path(flags.files, file)) for file in files])
    thinned = len(files) == 2
    paths = []
    for fold in range(flags.folds if thinned else 1):
        folder = work / f"{name}-{flags.seed}-{fold}"
        if not (folder / "data/dataset.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            held = held_out(train, thinned, np.random.default_rng([flags.seed, fold]))
            files = [str(folder / f"{part}.parquet") for part in ("train", "val")]
            for rows, path in zip((train[~held], train[held]), files, strict=True):
                rows.to_parquet(path, index=False)
            job("prepare", files[0], "--val", files[1], "--out", str(folder / "data"), "--lanes", "4",
                stdout=subprocess.DEVNULL)  # fmt: skip
        paths.append(str(folder / "data"))
    return paths


def held_out(rows: pd.DataFrame, thinned: bool, rng: np.random.Generator) -> Any:
    """Which rows the search sees its error on: (rows,) bool."""
    if not thinned:
        return rng.random(len(rows)) < 0.2
    users = rows["user_id"].unique()
    chosen = rng.choice(users, len(users) // 4, replace=False)
    return rows["user_id"].isin(chosen).to_numpy() & (rng.random(len(rows)) < 0.4)


class Trials:
    """Trainings by their settings and data; those of earlier calls are read from ``path``."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {(record["settings"], record["data"]): record["rmse"] for record in map(json.loads, lines)}

    def error(self, settings: Settings, paths: Sequence[str]) -> float:
        """The mean over ``paths`` of the RMSE of clipped predictions."""
        return float(np.mean([self._trial(settings, path) for path in paths]))

    def _trial(self, settings: Settings, path: str) -> float:
        key = (json.dumps({**settings, "seed": self.seed}, sort_keys=True), path)
        if key not in self.done:
            with tempfile.TemporaryDirectory() as folder:
                self.done[key] = rmse_of(settings, path, self.seed, folder)
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"settings": key[0], "data": path, "rmse": self.done[key]}) + "\n")
        return float(self.done[key])


def rmse_of(settings: Settings, path: str, seed: int, folder: str) -> float:
    """One training in this process."""
    file = Path(folder, "trial.toml")
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    arguments = ["--config", str(file), "--data", path, "--run-dir", f"{folder}/run", "--seed", str(seed),
                 "--checkpoint-every", "60m"]  # fmt: skip
    report = train(parse_config(TrainConfig, arguments, "search"), World.alone(), Console(speaks=False))
    assert report is not None
    return float(report["final"]["val_rmse_clipped"])


if __name__ == "__main__":
    sys.exit(main())

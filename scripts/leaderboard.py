#!/usr/bin/env python
"""RMSE and MAE of our recipe, the vignette's models and other systems, on the same splits, with the same seeds.

    MFDIST_TEST_DATA=FOLDER python scripts/leaderboard.py
    python scripts/leaderboard.py --files FOLDER --data ml-100k-u1,core164k --seeds 3 --work build/leaderboard --json F

Any folder of .csv, .tsv and .parquet files will do, user, item and rating in their first three columns; NAME.base.* and
NAME.test.* (or .train. and .val.) are one dataset. scripts/shapes.py makes some of other shapes.

Validation rows are the last fifth after pandas' ``sample(frac=1, random_state=42)``, or a predefined file. Every system
predicts the same validation rows; predictions are clipped to the rating scale. With several seeds, a row's squared
error is its mean over the seeds, on both sides of a comparison. The interval is that of RMSE(ours) - RMSE(best peer),
paired bootstrap, 95%; the best peer is the one with the lowest RMSE here, however late. ``seconds`` are those of
learning on what the machine has, loading and predicting left out. Each cell (dataset, system, seed) is kept in --work
as soon as it is there, so that the command can be stopped and run again; --systems takes some of them only.

Other systems live in environments of their own under ``.peers``, Surprise in ours. One that cannot be installed, and
SVD++ where the squares of the users' ratings add up to more than --svdpp-limit, is named as left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peers import ROOT, Array, PeerAbsent, columns_of, environment, job

from mfdist import metrics
from mfdist.data.dataset import Dataset
from mfdist.results.exported_model import ExportedModel

DATASETS = {
    "ml-1m": ("ml-1m.parquet",),
    "core164k": ("electronics-core164k.parquet",),
    "head50698": ("ratings_Electronics.head50698.csv",),
    "ml-100k-u1": ("ml-100k-u1.base.tsv", "ml-100k-u1.test.tsv"),
}
"""The files of datasets that have a name of their own: all ratings, or those of training and of validation."""
ENDINGS = (".csv", ".tsv", ".parquet")
PARTS = {"base": "test", "train": "val"}
COLUMNS = ["user_id", "item_id", "rating"]
OURS = "mfdist recipe"

MYFM = """
import sys, time, numpy as np, myfm
from scipy import sparse
z = np.load(sys.argv[1])
seed, users, items = int(sys.argv[3]), int(z["num_users"]), int(z["num_items"])
def one_hot(user, item):
    n = len(user)
    columns = np.stack([user, users + item.astype("i8")], 1).ravel()
    return sparse.csr_matrix((np.ones(2 * n), columns, np.arange(0, 2 * n + 1, 2)), shape=(n, users + items))
model = myfm.MyFMRegressor(rank=10, random_seed=seed)
began = time.perf_counter()
model.fit(one_hot(z["user"], z["item"]), z["rating"].astype("f8"), n_iter=200, n_kept_samples=200,
          group_shapes=[users, items])
seconds = time.perf_counter() - began
np.savez(sys.argv[2], predicted=model.predict(one_hot(z["val_user"], z["val_item"])), seconds=seconds)
"""
LIBMF = """
import sys, time, numpy as np
import libmf.mf as mf
z = np.load(sys.argv[1])
order = np.random.default_rng(int(sys.argv[3])).permutation(len(z["user"]))
train = np.ascontiguousarray(np.stack([z[c][order].astype("f4") for c in ("user", "item", "rating")], 1))
engine = mf.MF(k=64, nr_iters=20, nr_threads=int(sys.argv[4]), quiet=True, lambda_p1=0, lambda_q1=0, lambda_p2=0.05,
               lambda_q2=0.05, eta=0.1)
began = time.perf_counter()
engine.fit(train)
seconds = time.perf_counter() - began
user, item = z["val_user"], z["val_item"]
p, q = engine.p_factors(), engine.q_factors()
found = np.full(len(user), z["rating"].mean(), "f8")
known = np.isin(user, z["user"]) & np.isin(item, z["item"])
found[known] = (p[user[known]] * q[item[known]]).sum(1)
np.savez(sys.argv[2], predicted=np.where(np.isfinite(found), found, z["rating"].mean()), seconds=seconds)
"""


@dataclass(frozen=True)
class Split:
    """A prepared dataset; ``rows``: the same rows for other systems (``Split.arrays``)."""

    name: str
    dataset: Dataset
    rows: Path
    arrays: dict[str, Array]

    @property
    def work(self) -> Path:
        return self.rows.parent


@dataclass(frozen=True)
class System:
    """``learn(split, seed)`` gives raw predictions of the validation rows and seconds; ``reason(split)``: why not."""

    name: str
    learn: Callable[[Split, int], tuple[Array, float]]
    ours: bool = False
    seeded: bool = True
    reason: Callable[[Split], str] = lambda split: ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default=os.environ.get("MFDIST_TEST_DATA"), help="folder of the rating files")
    parser.add_argument("--data", default="", help="datasets, with commas between them; not given: all in the folder")
    parser.add_argument("--systems", default="", help="only systems whose name contains one of these words")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default="build/leaderboard", help="what is done already is kept here")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the systems that have them")
    parser.add_argument("--svdpp-limit", type=float, default=5e7, help="sum of squared ratings of a user")
    parser.add_argument("--config", default="", help="in place of the recipe, what training does without flags")
    parser.add_argument("--json", help="write the results here")
    flags = parser.parse_args(argv)
    found = datasets_in(Path(flags.files)) if flags.files else {}
    names = flags.data.split(",") if flags.data else list(found)
    if not names or set(names) - set(found):
        parser.error(f"give --files or MFDIST_TEST_DATA, and --data of what is there: {', '.join(found) or 'nothing'}.")
    wanted = flags.systems.split(",")
    systems = [s for s in list_systems(flags) if any(word in s.name for word in wanted)]
    rows = [row for name in names for row in measure(prepared(name, found[name], flags), systems, flags.seeds)]
    print_table(rows)
    if flags.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


# The data -----------------------------------------------------------------------------------------


def datasets_in(folder: Path) -> dict[str, tuple[str, ...]]:
    """The datasets of a folder by name, see ``DATASETS``."""
    there = sorted(path.name for path in folder.iterdir() if path.suffix in ENDINGS)
    found = {name: files for name, files in DATASETS.items() if set(files) <= set(there)}
    taken = {file for files in found.values() for file in files}
    for file in there:
        stem, ending = file.rsplit(".", 1)
        name, _, part = stem.rpartition(".")
        other = f"{name}.{PARTS.get(part)}.{ending}"
        if file not in taken:
            found[name if other in there else stem] = (file, other) if other in there else (file,)
            taken |= {file, other}
    return found


def read_ratings(path: Path) -> pd.DataFrame:
    """The columns user_id, item_id, rating: the first three of a file, whatever a first line calls them."""
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        third = str(pd.read_csv(path, header=None, sep=separator, nrows=1).iloc[0, 2])
        named = not third.replace(".", "", 1).lstrip("-").isdigit()
        frame = pd.read_csv(path, header=0 if named else None, sep=separator)
    frame = frame.iloc[:, :3].set_axis(COLUMNS, axis=1)
    return frame.astype({"user_id": str, "item_id": str, "rating": "float32"})


def divide(parts: Sequence[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training, validation): as given, or the last fifth of a shuffled whole."""
    if len(parts) == 2:
        return parts[0], parts[1]
    shuffled = parts[0].sample(frac=1, random_state=42)
    kept = len(shuffled) - len(shuffled) // 5
    return shuffled.iloc[:kept], shuffled.iloc[kept:]


def prepared(name: str, files: Sequence[str], flags: Any) -> Split:
    work = Path(flags.work).resolve() / name
    folder = work / "data"
    if not (folder / "dataset.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        frames = divide([read_ratings(Path(flags.files, file)) for file in files])
        paths = [str(work / f"{part}.parquet") for part in ("train", "val")]
        for frame, path in zip(frames, paths, strict=True):
            frame.to_parquet(path, index=False)
        job("prepare", paths[0], "--val", paths[1], "--out", str(folder), "--lanes", "4", stdout=subprocess.DEVNULL)
    dataset = Dataset.open(str(folder))
    manifest = dataset.manifest
    train, val = columns_of(dataset, "train"), columns_of(dataset, "val")
    order = np.random.default_rng(0).permutation(len(train["user"]))
    arrays = {key: column[order] for key, column in train.items()} | {f"val_{key}": c for key, c in val.items()}
    arrays |= {"num_users": np.int64(manifest.num_users), "num_items": np.int64(manifest.num_items)}
    np.savez(work / "rows.npz", **arrays)
    return Split(name, dataset, work / "rows.npz", arrays)


# The systems --------------------------------------------------------------------------------------


def list_systems(flags: Any) -> list[System]:
    from surprise import SVD, BaselineOnly, SVDpp

    vignette = "mfdist/configs/vignette_{}.toml"
    myfm = partial(in_environment, "myfm", ["myfm", "numpy", "scipy"], MYFM, [])
    libmf = partial(in_environment, "libmf", ["libmf", "numpy", "pyarrow"], LIBMF, [flags.threads])
    return [
        System(OURS, partial(ours, flags.config), ours=True),
        System("mf_advanced (vignette)", partial(ours, vignette.format("mf_advanced")), ours=True),
        System("mf (vignette)", partial(ours, vignette.format("mf")), ours=True),
        System("myFM, rank 10, 200 samples", myfm),
        System("LIBMF, k 64, 20 epochs", libmf),
        System("Surprise BaselineOnly", partial(surprise, lambda seed: BaselineOnly(verbose=False)), seeded=False),
        System("Surprise SVD", partial(surprise, lambda seed: SVD(random_state=seed))),
        System("Surprise SVD, reg 0.1, 32 factors",
               partial(surprise, lambda seed: SVD(n_factors=32, reg_all=0.1, random_state=seed))),
        System("Surprise SVD++", partial(surprise, lambda seed: SVDpp(random_state=seed)),
               reason=partial(too_long_for_svdpp, flags.svdpp_limit)),
    ]  # fmt: skip


def ours(config: str, split: Split, seed: int) -> tuple[Array, float]:
    """A run of jobs/train.py, and what its export predicts."""
    run = split.work / "run"
    given = ["--config", str(ROOT / config)] if config else []
    job("train", *given, "--data", split.dataset.path, "--run-dir", str(run), "--overwrite",
        "--seed", str(seed), "--checkpoint-every", "60m", stdout=subprocess.DEVNULL)  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    predicted = ExportedModel.open(str(run)).predict(split.arrays["val_user"], split.arrays["val_item"])
    raw = float(np.sqrt(np.mean((predicted - split.arrays["val_rating"]) ** 2)))
    assert abs(raw - report["final"]["val_rmse"]) < 1e-5 * raw, "the export predicts something else than the run did"
    return predicted, sum(epoch["seconds"] for epoch in report["epochs"])


def surprise(make: Callable[[int], Any], split: Split, seed: int) -> tuple[Array, float]:
    """A model of Surprise by hand: its own Dataset, fit and test."""
    from surprise import Dataset as Ratings
    from surprise import Reader

    rows = split.arrays
    frame = pd.DataFrame({name: rows[name] for name in ("user", "item", "rating")})
    ratings = Ratings.load_from_df(frame, Reader(rating_scale=split.dataset.manifest.rating_scale))
    trainset, model = ratings.build_full_trainset(), make(seed)
    began = time.perf_counter()
    model.fit(trainset)
    seconds = time.perf_counter() - began
    tested = model.test(list(zip(*(rows[f"val_{name}"].tolist() for name in ("user", "item", "rating")), strict=True)))
    return np.array([prediction.est for prediction in tested]), seconds


def in_environment(
    name: str, packages: Sequence[str], code: str, more: Sequence[Any], split: Split, seed: int
) -> tuple[Array, float]:
    """A system that runs in an environment of its own; PeerAbsent where that cannot be made."""
    python, out = environment(name, packages), split.work / f"{name}.npz"
    subprocess.run([str(python), "-c", code, str(split.rows), str(out), str(seed), *map(str, more)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    with np.load(out) as found:
        return found["predicted"], float(found["seconds"])


def too_long_for_svdpp(limit: float, split: Split) -> str:
    squares = float((np.bincount(split.arrays["user"]).astype(np.float64) ** 2).sum())
    return f"left out (squares: {squares / 1e6:.0f} M)" if squares > limit else ""


# Measuring ----------------------------------------------------------------------------------------


def measure(split: Split, systems: Sequence[System], seeds: int) -> list[dict[str, Any]]:
    """A row of the table for each system, the interval against the best peer with ours."""
    rating = split.arrays["val_rating"].astype(np.float64)
    rows, squares = [], {}
    for system in systems:
        row: dict[str, Any] = {"dataset": split.name, "system": system.name, "reason": system.reason(split)}
        rows.append(row)
        if row["reason"]:
            continue
        try:
            cells = [cell(split, system, seed) for seed in range(seeds if system.seeded else 1)]
        except PeerAbsent as error:
            row["reason"] = str(error)
            continue
        errors = np.stack([metrics.clip_to_scale(p, *split.dataset.manifest.rating_scale) for p, _ in cells]) - rating
        squares[system.name] = (errors**2).mean(axis=0)
        row |= {
            "rmse": float(squares[system.name].mean() ** 0.5), "mae": float(np.abs(errors).mean()),
            "rmse_of_seeds": np.sqrt((errors**2).mean(axis=1)).tolist(),
            "seconds": float(np.mean([seconds for _, seconds in cells])), "seeds": len(cells),
        }  # fmt: skip
    peers = {row["system"]: row["rmse"] for row, s in zip(rows, systems, strict=True) if "rmse" in row and not s.ours}
    if peers and OURS in squares:
        best = min(peers, key=lambda name: peers[name])
        for name in {best, "Surprise SVD"} & peers.keys():
            difference = compare(split, squares[OURS], squares[name])
            next(row for row in rows if row["system"] == name)["ours_minus_this"] = difference
    return rows


def cell(split: Split, system: System, seed: int) -> tuple[Array, float]:
    """(predictions, seconds) of one system with one seed: from --work, or learned now."""
    slug = "".join(c if c.isalnum() else "-" for c in system.name.lower())
    path = split.work / f"cell-{slug}-{seed}.npz"
    if not path.exists():
        print(f"{split.name}: {system.name}, seed {seed}", file=sys.stderr, flush=True)
        predicted, seconds = system.learn(split, seed)
        partial_path = path.with_suffix(".part.npz")
        np.savez(partial_path, predicted=predicted, seconds=seconds)
        partial_path.replace(path)
    with np.load(path) as found:
        return found["predicted"], float(found["seconds"])


def compare(split: Split, mine: Array, theirs: Array) -> list[float]:
    """RMSE(mine) - RMSE(theirs) and its 95% interval, from the squared errors of each row."""
    block = metrics.block_of(split.arrays["val_user"], split.arrays["val_item"], 0)
    sums = [np.bincount(block, weights, metrics.BLOCKS) for weights in (None, mine, theirs)]
    return list(metrics.bootstrap_interval(*sums, seed=0))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Markdown, as the README shows it: a cell is RMSE, MAE and seconds."""
    names, systems = list(dict.fromkeys(r["dataset"] for r in rows)), list(dict.fromkeys(r["system"] for r in rows))
    cells = {(row["system"], row["dataset"]): row for row in rows}
    print(f"| RMSE, MAE, seconds | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for system in systems:
        print(f"| {system} | {' | '.join(_figures(cells[system, name]) for name in names)} |")
    for row in rows:
        if "ours_minus_this" in row:
            difference, low, high = row["ours_minus_this"]
            print(f"\n{row['dataset']}: {OURS} against {row['system']}: RMSE {difference:+.4f}, "
                  f"95% interval [{low:+.4f}, {high:+.4f}]", end="")  # fmt: skip
    print()


def _figures(row: dict[str, Any]) -> str:
    return row["reason"] or f"{row['rmse']:.4f}, {row['mae']:.4f}, {row['seconds']:.1f}"


if __name__ == "__main__":
    sys.exit(main())

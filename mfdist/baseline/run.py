"""The baseline as a run: fit Surprise's SVD, measure it on the validation rows, report and export it as train does."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mfdist import json_tables, storage
from mfdist.baseline import svd
from mfdist.baseline.svd import FittedSVD
from mfdist.cluster.world import World
from mfdist.config import flag, parse_bytes, to_dict, to_toml
from mfdist.data.dataset import Dataset
from mfdist.data.loader import available_bytes
from mfdist.errors import UsageError
from mfdist.log import Console, MetricsLog
from mfdist.results import ranking, report
from mfdist.results.error_sums import ErrorSums, headline_of
from mfdist.results.exported_model import ExportedModel, write_model
from mfdist.results.floors import floors

JOB = "baseline_svd"
CHECKED_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The flags of jobs/baseline_svd.py; the defaults are those of Surprise's SVD."""

    data: str = flag("data/builtin", "dataset directory")
    run_dir: str = flag("runs/svd", "run directory to write; an earlier baseline in it is replaced")
    factors: int = flag(100, "number of factors", at_least=1)
    epochs: int = flag(20, "passes over the training ratings", at_least=1)
    seed: int = flag(42, "seed of the factors' initial values", at_least=0, at_most=2**32 - 1)
    max_memory: int | None = flag(None, "memory that may be used, such as 8GiB; not set: what is free",
                                  parse=parse_bytes)  # fmt: skip
    sample_users: float = flag(1.0, "fraction of the users, the same in every run, whose ratings are used",
                               above=0, at_most=1)  # fmt: skip


def run_baseline(config: BaselineConfig, console: Console | None = None) -> dict[str, Any]:
    """Fit, measure, write RUN; returns report.json's table. UsageError where memory is short, before any work."""
    console = console or Console()
    began = time.monotonic()
    config = replace(config, data=storage.absolute(config.data))
    dataset = Dataset.open(config.data)
    with console.busy("looking at the dataset's files"):
        dataset.check_files()
    _check_run(config.run_dir)
    limit = available_bytes() if config.max_memory is None else config.max_memory
    needed = svd.check_memory(dataset, config.factors, config.sample_users, limit)
    work = round(dataset.manifest.num_ratings["train"] * config.sample_users) * config.epochs
    seconds = work * (20 + config.factors) / 120 / svd.RATINGS_PER_SECOND
    console.info(f"Surprise's SVD needs about {needed / 1e9:.2f} GB and {seconds:.0f} s")
    storage.remove(storage.join(config.run_dir, "report.json"))
    storage.write_text(storage.join(config.run_dir, "config.toml"), to_toml(config))
    with console.progress("fit SVD", work) as progress:
        fitted = svd.fit(
            dataset, factors=config.factors, epochs=config.epochs, seed=config.seed, sample=config.sample_users,
            advance=progress.advance,
        )  # fmt: skip
    fit_end = time.monotonic()
    sums, worst = _measure(fitted, dataset, config.sample_users, console)
    console.info(f"predictions equal svd.test to {worst:.0e} on the first {CHECKED_ROWS} validation rows")
    figures = sums.figures()
    epochs = _epochs(fitted, fit_end, figures)
    with console.busy("writing the model"):
        write_model(config.run_dir, fitted.tensors(), _model_config(config), dataset)
    with console.busy("measuring simple predictions to compare with"):
        table = _report(config, dataset, epochs, figures, began)
    log = MetricsLog(storage.join(config.run_dir, "metrics.jsonl"))
    for entry in epochs:
        log.write("epoch", **entry)
    log.write("done", wall_seconds=table["wall_seconds"])
    log.publish()
    report.write_report(config.run_dir, table, figures, log.records())
    return table


def _check_run(run: str) -> None:
    """A baseline never overwrites a training's run."""
    if storage.exists(storage.join(run, "checkpoints")):
        raise UsageError(f"--run-dir {storage.redact(run)} is a run of train; name another directory for the baseline.")
    path = storage.join(run, "report.json")
    if storage.exists(path) and json_tables.read(path, "name another --run-dir").get("job") != JOB:
        raise UsageError(f"--run-dir {storage.redact(run)} holds the report of another job; name another directory.")


def _measure(fitted: FittedSVD, dataset: Dataset, sample: float, console: Console) -> tuple[ErrorSums, float]:
    """Error sums over the validation rows, and the largest difference to svd.test on the first of them."""
    sums, total = ErrorSums(dataset.manifest), round(dataset.manifest.num_ratings["val"] * sample)
    worst, unchecked = 0.0, CHECKED_ROWS
    known = fitted.trainset.user_inner, fitted.trainset.item_inner
    trained = dataset.counts("users"), dataset.counts("items")
    with console.progress("measure", total) as progress:
        for user, item, rating in svd.rows_of(dataset, "val", sample):
            if unchecked > 0:
                worst = max(worst, fitted.check(user[:unchecked], item[:unchecked], rating[:unchecked]))
                unchecked -= len(user)
            users, items = (  # of a sample the model knows fewer
                np.where(inner[rows] < 0, 0, np.maximum(counts[rows], 1))
                for inner, counts, rows in zip(known, trained, (user, item), strict=True)
            )
            sums.add(fitted.predict(user, item), rating, user, item, (users, items))
            progress.advance(len(user))
    return sums, worst


def _epochs(fitted: FittedSVD, end: float, headline: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry an epoch; Surprise gives no errors on the way, so only the last one has validation figures."""
    starts = fitted.trainset.epoch_starts
    entries = []
    for epoch, seconds in enumerate(after - before for before, after in itertools.pairwise([*starts, end])):
        last = epoch == len(starts) - 1
        entries.append({
            "epoch": epoch + 1, "train_rmse": None, "val_rmse": headline["val_rmse"] if last else None,
            "val_mae": headline["val_mae"] if last else None, "seconds": seconds,
            "ratings_per_second": fitted.trainset.n_ratings / max(seconds, 1e-9),
        })  # fmt: skip
    return entries


def _report(
    config: BaselineConfig, dataset: Dataset, epochs: list[dict[str, Any]], figures: dict[str, Any], began: float
) -> dict[str, Any]:
    headline = headline_of(figures)
    whole = config.sample_users >= 1.0
    return report.new_report(
        job=JOB, model="svd", manifest=dataset.manifest, world_size=1, device="cpu", seed=config.seed,
        config=to_dict(config), epochs=epochs,
        final=report.result(config.epochs, headline, "last epoch"),
        best_on_val=report.result(config.epochs, headline, "last epoch: Surprise measures no other"),
        slices=figures["slices"],
        floors=floors(dataset, World.alone()) if whole else {},  # they are of all rows, not of the sample's
        ranking=_ranking(config, dataset), wall_seconds=time.monotonic() - began,
    )  # fmt: skip


def _ranking(config: BaselineConfig, dataset: Dataset) -> dict[str, Any]:
    """Of the exported model, for users of the sample."""
    world, model = World.alone(), ExportedModel.open(config.run_dir)
    chosen = ranking.ranked_users(dataset, world, sample=config.sample_users)
    return ranking.rank_metrics(partial(ranking.top_of_model, model), chosen, dataset, world)


def _model_config(config: BaselineConfig) -> dict[str, Any]:
    return {"model": "svd", "dim": config.factors, "bias": True, "sigmoid": False, "sigmoid_range": None,
            "cold": "known-side"}  # fmt: skip

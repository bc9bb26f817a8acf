"""Runs on a dataset's validation rows: one table with floors, slices, activity, calibration and tested differences.

Every figure is made of sums that lanes and ranks add up (``world.sum``), so memory does not grow with the rows. Runs
are compared by their predictions clipped to the scale, and a difference of RMSE comes with its paired bootstrap
interval (``metrics.bootstrap_interval``): "better" means that the whole interval is below the margin.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist import metrics, storage
from mfdist.cluster.world import World
from mfdist.config import flag, positional
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.errors import ComparisonError, UsageError
from mfdist.metrics import SliceSums
from mfdist.results.export import ExportedModel
from mfdist.results.floors import LaneUsers, floors, lane_rows
from mfdist.results.ranking import rank_metrics
from mfdist.results.trained_on import dataset_of_run, sample_of_run

__all__ = ["EvaluateConfig", "check_required", "evaluate_runs", "floors", "format_table"]

ACTIVITY_CAP = 4096
"""Training counts from here on share a bin when deciles are made."""
CALIBRATION_BINS = 20

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Flags of jobs/evaluate.py."""

    runs: tuple[str, ...] = positional("run directories; differences are of the first one to each other one")
    split: str = flag("val", "rows to evaluate on", choices=("val", "train"))
    data: str | None = flag(None, "dataset directory, where it has moved since training")
    out: str | None = flag(None, "write everything as JSON to this file")
    require_better: str | None = flag(None, "end with 5 unless the first run is better than this run by the interval")
    margin: float = flag(0.0, "RMSE that the interval's upper end must stay below with --require-better")
    ranking: int = flag(0, "users, chosen by hash, to compute NDCG@10 and recall@10 for; 0: none", at_least=0)
    seed: int = flag(0, "seed of the bootstrap and of the choice of users", at_least=0)

    @property
    def all_runs(self) -> tuple[str, ...]:
        required = () if self.require_better is None or self.require_better in self.runs else (self.require_better,)
        return (*self.runs, *required)


def evaluate_runs(config: EvaluateConfig, world: World) -> dict[str, Any]:
    """Everything that --out writes: dataset, floors, runs, comparisons; collective, the same on every rank.

    Where a run was made on a sample of the users (baseline_svd --sample-users), all are measured on the smallest
    sample's rows. UsageError where the runs were not made on the same validation rows.
    """
    dataset = Dataset.open(config.data or dataset_of_run(config.runs[0]))
    models = [_EvaluatedModel(run, dataset) for run in config.all_runs]
    sample = min(sample_of_run(run) for run in config.all_runs)
    if sample < 1 and not all(model.same_rows for model in models):
        raise UsageError("A run on a sample of the users can be compared only with runs of the same prepared dataset.")
    sums = _scan_split(models, dataset, config, world, sample)
    table = [_figures(model, own, dataset) for model, own in zip(models, sums, strict=True)]
    if config.ranking:
        for model, entry in zip(models, table, strict=True):
            entry["ranking"] = model.ranking(dataset, world, config)
    manifest = dataset.manifest
    return {
        "dataset": {"name": manifest.name, "fingerprint": manifest.fingerprint,
                    "split_fingerprint": manifest.split.get("fingerprint")},
        "split": config.split,
        "sample_users": sample,
        "rows": table[0]["slices"]["all"]["rows"],
        "floors": floors(dataset, world, sample=sample) if config.split == "val" else {},
        "runs": table,
        "comparisons": [_comparison(config, table, sums, other) for other in range(1, len(models))],
    }  # fmt: skip


def check_required(config: EvaluateConfig, result: dict[str, Any]) -> None:
    """ComparisonError where --require-better is not met; nothing without it."""
    if config.require_better is None:
        return
    for entry in result["comparisons"]:
        if entry["against"] == storage.redact(config.require_better) and not entry["better"]:
            raise ComparisonError(
                f"{entry['run']} is not better than {entry['against']}: RMSE difference "
                f"{entry['rmse_difference']:+.4f}, and the 95% interval [{entry['low']:+.4f}, {entry['high']:+.4f}] "
                f"does not end below {config.margin:g}."
            )


# One pass over the split --------------------------------------------------------------------------


class _EvaluatedModel:
    """A run's model with the dataset's rows translated to its own, where it was prepared apart."""

    def __init__(self, run: str, dataset: Dataset) -> None:
        self.run = run
        self.model = ExportedModel.open(run)
        self._user_rows: Array | None = None
        self._item_rows: Array | None = None
        trained_on, manifest = self.model.config["dataset"], dataset.manifest
        if trained_on["fingerprint"] == manifest.fingerprint:
            return
        split = trained_on.get("split_fingerprint")
        if split is None or split != manifest.split.get("fingerprint"):
            raise UsageError(
                f"{storage.redact(run)} was trained on dataset {trained_on['name']} (split {split}) and cannot be "
                f"evaluated on the validation rows of {storage.redact(dataset.path)} (split "
                f"{manifest.split.get('fingerprint')}): they are not the same rows. Compare runs of one split."
            )
        self._user_rows = self.model.rows_of("users", dataset.ids("users").combine_chunks())
        self._item_rows = self.model.rows_of("items", dataset.ids("items").combine_chunks())

    @property
    def same_rows(self) -> bool:
        """Whether the run was made on this very dataset."""
        return self._user_rows is None

    def predict(self, user: Array, item: Array) -> Floats:
        """Predictions of rows of the dataset."""
        if self._user_rows is not None and self._item_rows is not None:
            user, item = self._user_rows[user], self._item_rows[item]
        return self.model.predict(user, item)

    def ranking(self, dataset: Dataset, world: World, config: EvaluateConfig) -> dict[str, Any]:
        if not self.same_rows:
            raise UsageError(f"--ranking needs runs of one dataset; {storage.redact(self.run)} was trained on another "
                             "preparation of the same rows.")  # fmt: skip
        return rank_metrics(self.model, dataset, world, config.ranking, seed=config.seed)


@dataclass
class _Sums:
    """Sums of one run: ``activity`` [user, item][training count][rows, sse, sae], ``calibration`` [bin][rows,
    prediction, rating] and ``blocks`` [block][rows, sse], the last three of clipped predictions.
    """

    slices: Floats
    activity: Floats
    calibration: Floats
    blocks: Floats


def _scan_split(
    models: Sequence[_EvaluatedModel], dataset: Dataset, config: EvaluateConfig, world: World, sample: float
) -> list[_Sums]:
    """One pass over this rank's lanes for all runs at once, then the sums over ranks; collective."""
    manifest = dataset.manifest
    low, high = manifest.rating_scale
    slices = [SliceSums(low, high, manifest.rating_step) for _ in models]
    sums = [_Sums(own.values, np.zeros((2, ACTIVITY_CAP + 1, 3)), np.zeros((CALIBRATION_BINS, 3)),
                  np.zeros((metrics.BLOCKS, 2))) for own in slices]  # fmt: skip
    item_counts = dataset.counts("items")
    for lane in lanes_of_rank(len(manifest.lanes), world.rank, world.size):
        users = LaneUsers(dataset, lane)
        user_counts = users.counts(dataset)
        for user, item, rating in lane_rows(dataset, config.split, lane, sample):
            counts = (user_counts[users.place(user)], item_counts[item])
            block = metrics.block_of(user, item, config.seed)
            for model, own, total in zip(models, slices, sums, strict=True):
                raw = model.predict(user, item)
                own.add(raw, rating, counts[0] == 0, counts[1] == 0)
                clipped = metrics.clip_to_scale(raw, low, high)
                _add_clipped(total, clipped, rating.astype(np.float64), counts, block, (low, high))
        for model in models:  # the next lane's users are others
            model.model.release_users()
    for own, total in zip(slices, sums, strict=True):
        total.slices, total.activity = world.sum(own.values), world.sum(total.activity)
        total.calibration, total.blocks = world.sum(total.calibration), world.sum(total.blocks)
    return sums


def _add_clipped(
    sums: _Sums, clipped: Floats, rating: Floats, counts: tuple[Array, Array], block: Array, scale: tuple[float, float]
) -> None:
    low, high = scale
    error = clipped - rating
    for side, count in enumerate(counts):
        bins = np.minimum(count, ACTIVITY_CAP)
        sums.activity[side] += _binned(bins, ACTIVITY_CAP + 1, error * error, np.abs(error))
    place = (clipped - low) / max(high - low, 1e-12) * CALIBRATION_BINS
    place = np.nan_to_num(np.clip(place, 0, CALIBRATION_BINS - 1)).astype(np.int64)
    sums.calibration += _binned(place, CALIBRATION_BINS, clipped, rating)
    sums.blocks += _binned(block, metrics.BLOCKS, error * error)


def _binned(bins: Array, size: int, *values: Floats) -> Floats:
    """(size, 1 + len(values)): rows of each bin and the sums of each value."""
    rows = np.bincount(bins, minlength=size).astype(np.float64)
    return np.stack([rows, *(np.bincount(bins, value, size) for value in values)], axis=1)


# Figures ------------------------------------------------------------------------------------------


def _figures(model: _EvaluatedModel, sums: _Sums, dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    summary = SliceSums.from_values(sums.slices, *manifest.rating_scale, manifest.rating_step).summary()
    bins, error = _calibration(sums.calibration)
    return {
        "run": storage.redact(model.run),
        "model": model.model.config["model"],
        **summary["headline"],
        "slices": summary["slices"],
        "user_activity": deciles(sums.activity[0]),
        "item_activity": deciles(sums.activity[1]),
        "calibration": bins,
        "calibration_error": error,
    }


def deciles(activity: Floats) -> list[dict[str, Any]]:
    """Ten equal parts of the rows by training count of their user (or item): fewer where many rows share a count.

    ``activity``: (counts, 3) sums of rows, squared and absolute errors. A count is never split between two parts.
    """
    rows = activity[:, 0]
    middle = np.cumsum(rows) - rows / 2
    part = np.minimum((10 * middle / max(rows.sum(), 1.0)).astype(np.int64), 9)
    found = []
    for number in range(10):
        counts = np.flatnonzero((part == number) & (rows > 0))
        if len(counts):
            total = activity[counts].sum(axis=0)
            found.append({
                "ratings_from": int(counts[0]), "ratings_to": int(counts[-1]), "rows": int(total[0]),
                "rmse": metrics.rmse(total[1], total[0]), "mae": metrics.mae(total[2], total[0]),
            })  # fmt: skip
    return found


def _calibration(sums: Floats) -> tuple[list[dict[str, Any]], float | None]:
    """Mean prediction and mean rating of each bin of predictions, and the mean distance of the two over rows."""
    bins = [
        {"rows": int(rows), "predicted": prediction / rows, "actual": rating / rows}
        for rows, prediction, rating in sums.tolist()
        if rows
    ]
    rows = sums[:, 0].sum()
    return bins, float(np.abs(sums[:, 1] - sums[:, 2]).sum() / rows) if rows else None


def _comparison(
    config: EvaluateConfig, table: list[dict[str, Any]], sums: Sequence[_Sums], other: int
) -> dict[str, Any]:
    difference, low, high = metrics.bootstrap_interval(
        sums[0].blocks[:, 0], sums[0].blocks[:, 1], sums[other].blocks[:, 1], config.seed
    )
    return {"run": table[0]["run"], "against": table[other]["run"], "rmse_difference": difference, "low": low,
            "high": high, "better": bool(high < config.margin)}  # fmt: skip


# Text ---------------------------------------------------------------------------------------------


def format_table(result: dict[str, Any]) -> str:
    """The result as a person reads it on a terminal."""
    split = "validation" if result["split"] == "val" else "training"
    share = result["sample_users"]
    part = "" if share == 1 else f" of a sample of {share:g} of the users"
    lines = [f"{result['dataset']['name']}: {result['rows']:,} {split} rows{part}; "
             "RMSE and MAE clipped to the scale, as all comparisons are"]  # fmt: skip
    head = ("", "RMSE", "MAE", "raw RMSE", "rounded", "calibration")
    rows: list[Sequence[Any]] = [
        (f"floor: {name.replace('_', ' ')}", f["rmse"], f["mae"], "", "", "") for name, f in result["floors"].items()
    ]
    for run in result["runs"]:
        rows.append((f"{run['run']} ({run['model']})", run["val_rmse_clipped"], run["val_mae_clipped"],
                     run["val_rmse"], run["val_rmse_rounded"], run["calibration_error"]))  # fmt: skip
    lines += _aligned(head, rows)
    names = [name for name, figures in result["runs"][0]["slices"].items() if figures["rows"]]
    counts = [f"{result['runs'][0]['slices'][name]['rows']:,}" for name in names]
    per_run = [(run["run"], *(run["slices"][name]["rmse"] for name in names)) for run in result["runs"]]
    lines += ["", "raw RMSE by slice", *_aligned(("", *names), [("rows", *counts), *per_run])]
    parts = result["runs"][0]["user_activity"]
    spans = [_span(part) for part in parts]
    by_activity = [(run["run"], *(part["rmse"] for part in run["user_activity"])) for run in result["runs"]]
    lines += ["", "RMSE by the user's training ratings", *_aligned(("", *spans), by_activity)]
    lines += _ranking_lines(result["runs"])
    for entry in result["comparisons"]:
        verdict = "better" if entry["high"] < 0 else "worse" if entry["low"] > 0 else "no difference shown"
        lines.append(f"\n{entry['run']} against {entry['against']}: RMSE {entry['rmse_difference']:+.4f}, 95% interval "
                     f"[{entry['low']:+.4f}, {entry['high']:+.4f}]: {verdict}")  # fmt: skip
    return "\n".join(lines)


def write_result(path: str, result: dict[str, Any]) -> None:
    storage.write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _ranking_lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    if "ranking" not in runs[0]:
        return []
    first = runs[0]["ranking"]
    rows = [("most popular items", *first["popularity"].values())]
    rows += [(run["run"], run["ranking"]["ndcg@10"], run["ranking"]["recall@10"]) for run in runs]
    title = f"ranking for {first['users']:,} users, relevant from {first['threshold']:g}"
    return ["", title, *_aligned(("", "NDCG@10", "recall@10"), rows)]


def _span(part: dict[str, Any]) -> str:
    first, last = part["ratings_from"], part["ratings_to"]
    return str(first) if first == last else f"{first}-{last}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[_text(value) for value in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip


def _text(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"

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
from mfdist.log import Console
from mfdist.results import ranking, ranking_metrics
from mfdist.results.comparison_page import comparison_page, verdict
from mfdist.results.error_sums import ErrorSums, deciles
from mfdist.results.exported_model import ExportedModel
from mfdist.results.floors import LaneUsers, floors, lane_rows
from mfdist.results.item_lists import ItemLists
from mfdist.results.trained_on import dataset_of_run, sample_of_run

__all__ = ["EvaluateConfig", "check_required", "deciles", "evaluate_runs", "floors", "format_table"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Flags of jobs/evaluate.py."""

    runs: tuple[str, ...] = positional("run directories; differences are of the first one to each other one")
    split: str = flag("val", "rows to evaluate on", choices=("val", "train"))
    data: str | None = flag(None, "dataset directory, where it has moved since training")
    out: str | None = flag(None, "write everything as JSON to this file")
    html: str | None = flag(None, "write everything as one page, with pictures, to this file")
    require_better: str | None = flag(None, "end with 5 unless the first run is better than this run by the interval")
    margin: float = flag(0.0, "RMSE that the interval's upper end must stay below with --require-better")
    ranking: int = flag(
        ranking.USERS, "about how many users, chosen by hash among those with a validation item that they like, "
        "rankings are measured for (NDCG, recall, MRR at 10, coverage); 0: none", at_least=0,
    )  # fmt: skip
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
    console = Console(world.is_main, aside=True)
    dataset = Dataset.open(config.data or dataset_of_run(config.runs[0]))
    with console.busy("opening the models"):
        models = [_EvaluatedModel(run, dataset) for run in config.all_runs]
    sample = min(sample_of_run(run) for run in config.all_runs)
    if sample < 1 and not all(model.same_rows for model in models):
        raise UsageError("A run on a sample of the users can be compared only with runs of the same prepared dataset.")
    if any(model.model.is_ranking for model in models):
        return _by_ranking(models, dataset, config, world, sample)
    sums = _scan_split(models, dataset, config, world, sample)
    table = [
        {"run": storage.redact(model.run), "model": model.model.config["model"], **own.figures()}
        for model, own in zip(models, sums, strict=True)
    ]
    if config.ranking:
        _add_rankings(table, models, dataset, config, world, sample)
    with console.busy("measuring simple predictions to compare with"):
        reached = floors(dataset, world, sample=sample) if config.split == "val" else {}
    return {
        "dataset": _about(dataset),
        "split": config.split,
        "sample_users": sample,
        "rows": table[0]["slices"]["all"]["rows"],
        "floors": reached,
        "runs": table,
        "comparisons": [_comparison(config, table, sums, other) for other in range(1, len(models))],
    }  # fmt: skip


def _by_ranking(
    models: Sequence[_EvaluatedModel], dataset: Dataset, config: EvaluateConfig, world: World, sample: float
) -> dict[str, Any]:
    """The result of runs of which some rank and predict no ratings: they are compared by their rankings alone."""
    named = next(storage.redact(model.run) for model in models if model.model.is_ranking)
    for flag_name, given in (("--require-better", config.require_better), ("--html", config.html),
                             ("--ranking 0", not config.ranking)):  # fmt: skip
        if given:
            raise UsageError(f"{flag_name} is about errors, and {named} was trained with --objective ranking, "
                             "whose scores are no ratings: runs are compared by their rankings.")  # fmt: skip
    table = [{"run": storage.redact(model.run), "model": model.model.config["model"]} for model in models]
    _add_rankings(table, models, dataset, config, world, sample)
    return {"dataset": _about(dataset), "split": config.split, "sample_users": sample,
            "rows": dataset.manifest.num_ratings[config.split], "floors": {}, "runs": table,
            "comparisons": []}  # fmt: skip


def _add_rankings(
    table: list[dict[str, Any]], models: Sequence[_EvaluatedModel], dataset: Dataset, config: EvaluateConfig,
    world: World, sample: float,
) -> None:  # fmt: skip
    with Console(world.is_main, aside=True).busy("measuring the recommendations"):
        chosen = ranking.ranked_users(dataset, world, config.ranking, seed=config.seed, sample=sample)
        for model, entry in zip(models, table, strict=True):
            entry["ranking"] = ranking.rank_metrics(model.top, chosen, dataset, world)


def _about(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {"name": manifest.name, "fingerprint": manifest.fingerprint,
            "split_fingerprint": manifest.split.get("fingerprint")}  # fmt: skip


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

    def top(self, users: Array, k: int, hidden: ItemLists) -> npt.NDArray[np.int64]:
        """Item rows (users, k) of the dataset: the best of each user, without the ``hidden`` ones (``ranking.Top``)."""
        if self._user_rows is None or self._item_rows is None:
            return ranking.top_of_model(self.model, users, k, hidden)
        theirs = ItemLists(hidden.starts, self._item_rows[hidden.items])
        found = ranking.top_of_model(self.model, self._user_rows[users], k, theirs)
        row_here = np.full(self.model.num_items + 1, -1, np.int64)  # the last one: that of -1
        row_here[self._item_rows] = np.arange(len(self._item_rows))
        row_here[-1] = -1
        return row_here[found]


def _scan_split(
    models: Sequence[_EvaluatedModel], dataset: Dataset, config: EvaluateConfig, world: World, sample: float
) -> list[ErrorSums]:
    """One pass over this rank's lanes for all runs at once, then the sums over ranks; collective."""
    manifest = dataset.manifest
    sums = [ErrorSums(manifest, config.seed) for _ in models]
    item_counts = dataset.counts("items")
    total = manifest.num_ratings[config.split]
    with Console(world.is_main, aside=True).progress(
        f"evaluate {len(models)} {'run' if len(models) == 1 else 'runs'}", total
    ) as bar:
        for lane in lanes_of_rank(len(manifest.lanes), world.rank, world.size):
            users = LaneUsers(dataset, lane)
            user_counts = users.counts(dataset)
            for user, item, rating in lane_rows(dataset, config.split, lane, sample):
                counts = (user_counts[users.place(user)], item_counts[item])
                for model, own in zip(models, sums, strict=True):
                    own.add(model.predict(user, item), rating, user, item, counts)
                bar.advance(len(user) * world.size)
            for model in models:  # the next lane's users are others
                model.model.release_users()
    for own in sums:
        own.add_ranks(world.sum)
    return sums


# Figures ------------------------------------------------------------------------------------------


def _comparison(
    config: EvaluateConfig, table: list[dict[str, Any]], sums: Sequence[ErrorSums], other: int
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
    if "slices" not in result["runs"][0]:
        title = f"{result['dataset']['name']}: {result['rows']:,} {split} rows{part}; not all of these predict ratings"
        return "\n".join([title, *_ranking_lines(result["runs"])])
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
        lines.append(f"\n{entry['run']} against {entry['against']}: RMSE {entry['rmse_difference']:+.4f}, 95% interval "
                     f"[{entry['low']:+.4f}, {entry['high']:+.4f}]: {verdict(entry)}")  # fmt: skip
    return "\n".join(lines)


def write_result(config: EvaluateConfig, result: dict[str, Any]) -> list[str]:
    """Write what --out and --html ask for; returns the paths as they may be shown."""
    if config.out is not None:
        storage.write_text(config.out, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if config.html is not None:
        storage.write_text(config.html, comparison_page(result))
    return [storage.redact(path) for path in (config.out, config.html) if path is not None]


def _ranking_lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    if "ranking" not in runs[0]:
        return []
    rankings = {run["run"]: run["ranking"] for run in runs}
    title = f"ranking of {ranking_metrics.basis(runs[0]['ranking'])}"
    doubts = [f"{name}: {doubt}" for name, found in rankings.items() if (doubt := ranking_metrics.doubt_about(found))]
    table = _aligned(("", *ranking_metrics.FIGURES.values()), ranking_metrics.rows(rankings))
    return ["", title, *table, *doubts]


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

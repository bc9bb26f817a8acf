"""The vignette's figures beside ours: OUT/index.html of what scripts/reproduce has left in OUT.

    python scripts/vignette_page.py runs/reproduce-twin

Its plots are not shipped: rings are the numbers that it printed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reproduce import allowed_text, number_text, read_json
from vignette import CURVES, HISTOGRAM, TOP_USERS, USERS, USERS_OF_50

from mfdist import __version__
from mfdist.data.dataset import Dataset
from mfdist.metrics import round_to_scale
from mfdist.pages.charts import Series, bar_chart, line_chart
from mfdist.pages.page import day, render
from mfdist.results.exported_model import ExportedModel
from mfdist.results.floors import lane_rows

STARS = np.arange(1, 6)


def main(argv: Sequence[str]) -> int:
    out = Path(argv[0])
    result = json.loads((out / "result.json").read_text())
    reports = {name: read_json(out / name / "report.json") for name in result["runs"]}
    dataset = Dataset.open(str(out / "data"))
    figures = panels(result, reports, dataset, str(out / "mf_advanced"))
    (out / "index.html").write_text(page(result, reports, figures))
    return 0


# What is drawn ------------------------------------------------------------------------------------


def ratings_per_user(dataset: Dataset) -> np.ndarray[Any, Any]:
    """int64 (users,): training and validation ratings of each user."""
    counts = np.zeros(dataset.manifest.num_users, np.int64)
    for lane in range(len(dataset.manifest.lanes)):
        for split in ("train", "val"):
            for user, _, _ in lane_rows(dataset, split, lane):
                np.add.at(counts, user, 1)
    return counts


def rounded_against_ratings(dataset: Dataset, run: str) -> np.ndarray[Any, Any]:
    """int64 (5, 5): validation rows by rating (row) and prediction rounded to whole stars (column)."""
    model, table = ExportedModel.open(run), np.zeros((5, 5), np.int64)
    for lane in range(len(dataset.manifest.lanes)):
        for user, item, rating in lane_rows(dataset, "val", lane):
            star = round_to_scale(model.predict(user, item), 1, 5, 1)
            np.add.at(table, (rating.astype(np.int64) - 1, star.astype(np.int64) - 1), 1)
    return table


def panels(
    result: dict[str, Any], reports: dict[str, Any], dataset: Dataset, advanced: str
) -> list[tuple[str, list[Any], Any]]:
    """(heading, figures, table of shares or None), the vignette's left and ours right."""
    ours = "this run, SYNTHETIC ratings" if result["synthetic"] else "this run"
    found: list[tuple[str, list[Any], Any]] = [
        ("Figure 1: ratings", _histograms(dataset, ours), None),
        ("Figure 2: ratings per user", [_users(ratings_per_user(dataset), ours)], None),
        ("Figure 7: RMSE by epoch", [_curves(name, reports[name]["epochs"], ours) for name in CURVES], None),
    ]
    counts = rounded_against_ratings(dataset, advanced)
    shares = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).tolist()
    steps = [(edge, star) for star in range(1, 6) for edge in (star - 0.5, star + 0.5)]
    chart = line_chart([Series("rounded", steps, "c", "plain")], "prediction", "rounded to whole stars")
    table = {
        "labels": [f"{star}" for star in STARS],
        "rows": [(f"{s}", row) for s, row in zip(STARS, shares, strict=True)],
    }
    found.append(("Figure 10: rounding to whole stars", [("The vignette's step function", chart, "")], table))
    return found


def _histograms(dataset: Dataset, ours: str) -> list[Any]:
    found = dataset.manifest.rating_histogram
    theirs = bar_chart(
        [(f"{star}", count) for star, count in zip(STARS, HISTOGRAM, strict=True)], "stars", "ratings", "c"
    )
    here = bar_chart([(f"{value:g}", count) for value, count in found], "stars", "ratings")
    return [("vignette", theirs, ""), (ours, here, "")]


def _users(counts: np.ndarray[Any, Any], ours: str) -> Any:
    degree, users = np.unique(counts[counts > 0], return_counts=True)
    at_least = users[::-1].cumsum()[::-1]
    theirs = [(1.0, float(USERS)), (50.0, float(USERS_OF_50))]
    theirs += [(float(top), float(rank)) for rank, top in reversed(list(enumerate(TOP_USERS, 1)))]
    series = [Series(ours, list(zip(degree.tolist(), at_least.tolist(), strict=True)), "a", "dots"),
              Series("vignette's file: totals and its ten most active users", theirs, "c", "rings")]  # fmt: skip
    chart = line_chart(series, "ratings", "users with so many or more", log_x=True, log_y=True)
    return "Users by ratings", chart, "Both axes are logarithmic."


def _curves(name: str, epochs: list[dict[str, Any]], ours: str) -> Any:
    """Ours as curves, the printed numbers as rings."""
    series = []
    for key, tone, label in (("train_rmse", "b", "training"), ("val_rmse", "a", "validation")):
        series.append(Series(f"{label}, {ours}", [(epoch["epoch"], epoch[key]) for epoch in epochs], tone))
    for key, tone, label in (("train_rmse", "f", "training"), ("val_rmse", "c", "validation")):
        printed = [(float(epoch + 1), value) for epoch, value in CURVES[name][key].items()]
        series.append(Series(f"{label}, as the vignette printed it", printed, tone, "rings"))
    chart = line_chart(series, "epoch", "RMSE", whole_x=True, from_zero=True)
    return name, chart, "The vignette counts epochs from 0, this page from 1."


# The page -----------------------------------------------------------------------------------------


def page(result: dict[str, Any], reports: dict[str, Any], figures: list[tuple[str, list[Any], Any]]) -> str:
    """One page that needs no other file and no network."""
    checks = [
        (entry["verdict"].split()[0],
         (entry["of"], entry["what"], number_text(entry["published"], entry["published"]),
          number_text(entry["ours"], entry["published"]), allowed_text(entry["tolerance"]), entry["verdict"]))
        for entry in result["checks"]
    ]  # fmt: skip
    steps = [(name, f"{used['seconds']:.1f}", f"{used['peak_rss_bytes'] / 2**30:.2f}")
             for name, used in result["steps"].items()]  # fmt: skip
    return render(
        "reproduction.html", result=result, checks=checks,
        title="The vignette, reproduced" + (" on synthetic ratings" if result["synthetic"] else ""),
        models=_models(reports), panels=figures, steps=steps,
        footer=f"mfdist {__version__}, {day(time.time())}",
    )  # fmt: skip


def _models(reports: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, report in reports.items():
        final = report["final"]
        rows.append((name, final["val_rmse_clipped"], final["val_mae_clipped"], final["val_rmse"],
                     final["val_rmse_rounded"], f"{report['wall_seconds']:.0f}"))  # fmt: skip
    floors = reports["mf"]["floors"].items()
    return rows + [(name.replace("_", " "), floor["rmse"], floor["mae"], None, None, None) for name, floor in floors]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``evaluate --html FILE``: several runs on the same validation rows, as one page."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mfdist import __version__, json_tables, storage
from mfdist.pages.charts import TONES, Interval, Level, Series, interval_chart, line_chart
from mfdist.pages.page import day, render
from mfdist.results import ranking_metrics
from mfdist.results.run_page import FLOOR_TONES, FLOORS, SLICES, Figure, activity_figure, error_figures, level_shares

Record = Mapping[str, Any]


def comparison_page(result: Record) -> str:
    """``result``: ``evaluate_runs``'; the curves are those of the runs' own reports, where they have any."""
    result = _short_names(result)
    runs = result["runs"]
    best = min(range(len(runs)), key=lambda k: runs[k]["val_rmse_clipped"] or float("inf"))
    split = "validation" if result["split"] == "val" else "training"
    title = f"{len(runs)} runs on {result['dataset']['name']}" if len(runs) > 1 else f"{runs[0]['run']} evaluated"
    return render(
        "comparison.html", title=title, result=result, split=split, table_rows=_rows(result), own=best,
        figures=[*_differences(result), _curves(result), *_by_activity(runs)], best=runs[best],
        slices=_slices(runs), run_names=[run["run"] for run in runs],
        verdicts=[(f"{c['run']} against {c['against']}", f"{c['rmse_difference']:+.4f}",
                   f"{c['low']:+.4f} to {c['high']:+.4f}", verdict(c)) for c in result["comparisons"]],
        errors=error_figures(runs[best]), levels=level_shares(runs[best]), ranking=_ranking(runs),
        ranking_head=["", *ranking_metrics.FIGURES.values()],
        ranking_of=ranking_metrics.basis(runs[0]["ranking"]) if "ranking" in runs[0] else "",
        footer=f"mfdist {__version__}, {day(time.time())}; dataset {result['dataset']['fingerprint']}",
    )  # fmt: skip


def _short_names(result: Record) -> dict[str, Any]:
    """``result`` with runs called without the folders that all of them lie in; ``path`` keeps the whole name."""
    names = [run["run"] for run in result["runs"]]
    folder = os.path.commonpath(names) if len(set(names)) > 1 and len({n.startswith("/") for n in names}) == 1 else ""
    short = {name: os.path.relpath(name, folder) if folder and "://" not in name else name for name in names}
    compared = [{**c, "run": short[c["run"]], "against": short[c["against"]]} for c in result["comparisons"]]
    runs = [{**run, "run": short[run["run"]], "path": run["run"]} for run in result["runs"]]
    return {**result, "runs": runs, "comparisons": compared}


def verdict(comparison: Record) -> str:
    """The word for a difference of RMSE with its 95% interval."""
    return "better" if comparison["high"] < 0 else "worse" if comparison["low"] > 0 else "no difference shown"


def _rows(result: Record) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for run in result["runs"]:
        interval = run.get("rmse_interval")
        rows.append((f"{run['run']} ({run['model']})", run["val_rmse_clipped"],
                     f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else None, run["val_mae_clipped"],
                     run["val_rmse"], run["val_rmse_rounded"], run["calibration_error"]))  # fmt: skip
    floors = [(FLOORS.get(name, name), f["rmse"], None, f["mae"], None, None, None)
              for name, f in result["floors"].items()]  # fmt: skip
    return rows + floors


def _differences(result: Record) -> list[Figure]:
    tones = {"better": "d", "worse": "muted"}
    rows = [Interval(f"{c['run']} against {c['against']}", c["rmse_difference"], c["low"], c["high"],
                     tones.get(verdict(c), "b")) for c in result["comparisons"]]  # fmt: skip
    caption = "Paired bootstrap, 95%: an interval left of the line means fewer errors than the other run."
    return [("Differences", interval_chart(rows, "difference of RMSE, clipped"), caption)] if rows else []


def _curves(result: Record) -> Figure:
    """Validation RMSE by epoch of every run that has a curve."""
    series = []
    for run, tone in zip(result["runs"], TONES * 9, strict=False):
        points = [(e["epoch"], e["val_rmse"]) for e in _report_of(run["path"]).get("epochs", ()) if e["val_rmse"]]
        if len(points) > 1:
            series.append(Series(run["run"], points, tone))
    levels = [Level(run["val_rmse"], f"{run['run']} at its end", tone)
              for run, tone in zip(result["runs"], TONES * 9, strict=False)
              if run["run"] not in {one.label for one in series} and run["val_rmse"] is not None]  # fmt: skip
    levels += [Level(f["rmse"], FLOORS.get(name, name), *style)
               for (name, f), style in zip(result["floors"].items(), FLOOR_TONES, strict=False)
               if f["rmse"]]  # fmt: skip
    chart = line_chart(series, "epoch", "validation RMSE", levels=levels if series else (), whole_x=True)
    return "Validation error by epoch", chart, "As predicted, before clipping to the scale."


def _report_of(run: str) -> dict[str, Any]:
    path = storage.join(run, "report.json")
    return json_tables.read(path, "make the run again") if storage.exists(path) else {}


def _by_activity(runs: Sequence[Record]) -> list[Figure]:
    """All runs in one picture; a single run has its own further down."""
    if len(runs) == 1:
        return []
    return [
        figure
        for side in ("user", "item")
        for figure in activity_figure(
            side, [(run["run"], run[f"{side}_activity"], tone) for run, tone in zip(runs, TONES * 9, strict=False)]
        )
    ]


def _slices(runs: Sequence[Record]) -> list[tuple[Any, ...]]:
    return [(SLICES.get(name, name), found["rows"], *(run["slices"][name]["rmse"] for run in runs))
            for name, found in runs[0]["slices"].items() if found["rows"]]  # fmt: skip


def _ranking(runs: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Rows of a table, the runs and then popularity; [] where nothing was ranked."""
    if "ranking" not in runs[0]:
        return []
    return ranking_metrics.rows({run["run"]: run["ranking"] for run in runs})

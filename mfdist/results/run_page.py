"""RUN/report.html: a run as a person looks at it, from report.json, validation.json and metrics.jsonl."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mfdist.pages.charts import Event, Level, Series, bar_chart, line_chart, row_chart
from mfdist.pages.page import day, render
from mfdist.pages.page import seconds as seconds_in_words
from mfdist.results import ranking_metrics

FLOORS = {"global_mean": "mean of all ratings", "item_mean": "mean of the item", "bias": "user and item biases"}
"""What a person reads for the floors of report.json."""
SLICES = {"all": "all rows", "warm": "user and item seen in training", "cold_user": "user never seen in training",
          "cold_item": "item never seen in training", "cold_both": "neither seen in training"}  # fmt: skip
FLOOR_TONES = (("muted", "6 3"), ("f", "2 3"), ("c", "9 3 2 3"))
JOBS = {"baseline_svd": "baseline"}
Record = Mapping[str, Any]
Figure = tuple[str, Markup, str]


def run_page(report: Record, validation: Record | None = None, records: Sequence[Record] = (), run: str = "RUN") -> str:
    """``validation``: ``ErrorSums.figures()`` of the epoch that counts; ``records``: those of metrics.jsonl."""
    data, ranks = report["dataset"], report["config"].get("objective") == "ranking"
    head, epochs = _epochs(report, records)
    figures = [ranking_by_epoch(report) if ranks else error_by_epoch(report), *time_figures(records)]
    return render(
        "run.html", title=f"{report['model']} on {data['name']}", report=report, data=data, final=report["final"],
        best=report["final"] if ranks else report["best_on_val"], figures=figures, beside=_beside(report),
        cards_=_ranking_cards(report) if ranks else _cards(report, validation), epochs_head=head,
        slices=[] if ranks else _slices(report),
        errors=error_figures(validation) if validation else [], levels=level_shares(validation),
        **_ranking(report), epochs=epochs,
        events=_events(records), warnings=[r["text"] for r in records if r["kind"] == "warning"],
        config=[(key.replace("_", "-"), "not set" if v is None else str(v)) for key, v in report["config"].items()],
        command=_command(report, run), footer=f"mfdist {report['versions'].get('mfdist', '')}, {day(time.time())}",
    )  # fmt: skip


def error_by_epoch(report: Record) -> Figure:
    """Training and validation RMSE of each epoch with the floors; nothing where there is no curve (Surprise's SVD)."""
    series = [
        Series("training (running)", [(e["epoch"], e["train_rmse"]) for e in report["epochs"]
                                      if e["train_rmse"] is not None], "b"),
        Series("validation, clipped", validation_curve(report), "a"),
    ]  # fmt: skip
    if max(len(one.points) for one in series) < 2:
        return "Error by epoch", Markup(""), ""
    levels = [Level(floor["rmse"], FLOORS.get(name, name), *style)
              for (name, floor), style in zip(report["floors"].items(), FLOOR_TONES, strict=False)
              if floor["rmse"] is not None]  # fmt: skip
    best = report["best_on_val"]
    events = [Event(best["epoch"], f"epoch {best['epoch']}, lowest on validation", "d")]
    chart = line_chart(series, "epoch", "RMSE", levels=levels, events=events, whole_x=True)
    return "Error by epoch", chart, "Training error is the running one: each rating before its own update."


def validation_curve(report: Record) -> list[tuple[int, float]]:
    """(epoch, RMSE of predictions clipped to the scale), as the floors are; raw where an earlier version wrote them."""
    found = [(epoch["epoch"], epoch.get("val_rmse_clipped", epoch["val_rmse"])) for epoch in report["epochs"]]
    return [(epoch, rmse) for epoch, rmse in found if rmse is not None]


def ranking_by_epoch(report: Record) -> Figure:
    """NDCG of each epoch beside that of the most popular items."""
    points = [(e["epoch"], e["val_ndcg"]) for e in report["epochs"] if e.get("val_ndcg") is not None]
    title, name = "Ranking by epoch", ranking_metrics.FIGURES[ranking_metrics.HEADLINE]
    if len(points) < 2:
        return title, Markup(""), ""
    popular = Level(report["ranking"]["popularity"][ranking_metrics.HEADLINE], "most popular items", *FLOOR_TONES[0])
    return title, line_chart([Series(name, points, "a")], "epoch", name, levels=[popular], whole_x=True), ""


# Over time ----------------------------------------------------------------------------------------


def time_figures(records: Sequence[Record]) -> list[Figure]:
    """Throughput over the time at work with checkpoints and restarts, and where the time went; [] where not known."""
    clock = work_seconds(records)
    speeds = [(at, record["ratings_per_second"] / 1e6) for at, record in zip(clock, records, strict=True)
              if record["kind"] == "interval"]  # fmt: skip
    found: list[Figure] = []
    if len(speeds) >= 2:
        names = {"checkpoint": ("checkpoint", "d"), "resume": ("restart", "c"), "stop": ("stopped on request", "muted")}
        events = [Event(at, f"{names[r['kind']][0]}: step {r.get('step', 0):,}", names[r["kind"]][1])
                  for at, r in zip(clock, records, strict=True) if r["kind"] in names]  # fmt: skip
        chart = line_chart([Series("training speed", speeds, "a", "plain")], "seconds at work", "M ratings/s",
                           events=events, from_zero=True)  # fmt: skip
        found.append(("Training speed over time", chart, "Pauses between a stop and its restart are left out."))
    spent = phase_seconds(records)
    if sum(spent.values()) > 1:
        rows = [(name, value, seconds_in_words(value)) for name, value in spent.items()]
        found.append(("Where the time went", row_chart(rows, "seconds", "e"), ""))
    return found


def work_seconds(records: Sequence[Record]) -> list[float]:
    """Seconds at work of each record: the time between a run's last record and its restart does not count."""
    clock, seconds, before = [], 0.0, None
    for record in records:
        if before is not None and record["kind"] not in ("resume", "start"):
            seconds += max(0.0, record["time"] - before)
        before = record["time"]
        clock.append(seconds)
    return clock


def phase_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Seconds of learning, of waiting for data and for other ranks, of checkpoints, validation and compilation."""

    def total(kind: str, key: str) -> float:
        return float(sum(record.get(key) or 0.0 for record in records if record["kind"] == kind))

    waits = {
        "waiting for data": total("interval", "wait_seconds"),
        "waiting for ranks": total("interval", "ranks_wait_seconds"),
        "checkpoints": total("checkpoint", "pause_seconds"),
    }  # fmt: skip
    spent = {
        "learning": max(0.0, total("epoch", "seconds") - sum(waits.values())), **waits,
        "validation": total("epoch", "validation_seconds"), "compiling": total("compile", "seconds"),
    }  # fmt: skip
    return {name: seconds for name, seconds in spent.items() if seconds or name in ("learning", "validation")}


# The error ----------------------------------------------------------------------------------------


def error_figures(figures: Record) -> list[Figure]:
    """Pictures of ``ErrorSums.figures()``: by ratings of user and item, calibration, residuals."""
    found: list[Figure] = []
    for side, tone in (("user", "a"), ("item", "c")):
        found += activity_figure(side, [("this model", figures[f"{side}_activity"], tone)])
    enough = max(10, figures["slices"]["all"]["rows"] // 2000)
    points = [(part["predicted"], part["actual"]) for part in figures["calibration"] if part["rows"] >= enough]
    if len(points) > 1:
        chart = line_chart([Series("mean of a bin", points, "a")], "predicted", "actual", diagonal=True)
        error = figures["calibration_error"]
        caption = (f"Rows with about this prediction were rated so on average (at least {enough} rows a point); mean "
                   f"distance {error:.4f}.")  # fmt: skip
        found.append(("Predicted against actual", chart, caption))
    residuals = figures["residuals"]
    if sum(residuals["rows"]):
        width = (residuals["to"] - residuals["from"]) / len(residuals["rows"])
        bars = [(f"{residuals['from'] + width * (k + 0.5):+.3g}", rows) for k, rows in enumerate(residuals["rows"])]
        used = [k for k, (_, rows) in enumerate(bars) if rows]
        chart = bar_chart(bars[max(used[0] - 1, 0) : used[-1] + 2], "prediction minus rating", "validation rows", "b")
        found.append(("Residuals", chart, "Clipped to the scale."))
    return found


def activity_figure(side: str, runs: Sequence[tuple[str, Sequence[Record], str]]) -> list[Figure]:
    """RMSE by training ratings of the user or item, a curve for each (name, parts of ``deciles``, tone)."""
    names = [count_span(part) for part in runs[0][1]]
    if len(names) < 2:
        return []
    series = [Series(name, [(k + 1, part["rmse"]) for k, part in enumerate(parts)], tone)
              for name, parts, tone in runs]  # fmt: skip
    chart = line_chart(series, f"training ratings of the {side}", "RMSE", names=names)
    caption = "Each point is about a tenth of the validation rows, or more where many share a count."
    return [(f"Error by the {side}'s training ratings", chart, caption)]


def level_shares(figures: Record | None) -> dict[str, Any] | None:
    """Of each rating, the shares of its rows by rounded prediction: labels and rows for the template; None of none."""
    if not figures or not sum(map(sum, figures["levels"]["rows"])):
        return None
    labels = [f"{rating:g}" for rating in figures["levels"]["ratings"]]
    rows = [(label, [count / max(sum(counts), 1) for count in counts])
            for label, counts in zip(labels, figures["levels"]["rows"], strict=True)]  # fmt: skip
    return {"labels": labels, "rows": rows}


def count_span(part: Record) -> str:
    """The counts of a part of ``deciles`` as text."""
    first, last = part["ratings_from"], part["ratings_to"]
    return str(first) if first == last else f"{first}-{last}"


# Words --------------------------------------------------------------------------------------------


def _cards(report: Record, validation: Record | None) -> list[tuple[Any, str]]:
    final, floors = report["final"], report["floors"]
    interval = (validation or {}).get("rmse_interval")
    within = f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    cards = [(final["val_rmse_clipped"], f"validation RMSE, clipped to the scale{within}"),
             (final.get("val_mae_clipped"), "validation MAE, clipped to the scale"),
             (final["val_rmse_rounded"], "RMSE, rounded to the scale")]  # fmt: skip
    floor = floors.get("bias", {}).get("rmse")
    if floor and final["val_rmse_clipped"] is not None:
        change = final["val_rmse_clipped"] / floor - 1
        cards.insert(1, (f"{change:+.1%}", "beside user and item biases alone"))
    return cards


def _ranking_cards(report: Record) -> list[tuple[Any, str]]:
    """The headline of a ranking."""
    ranking, headline = report["ranking"], ranking_metrics.HEADLINE
    others = [(ranking[key], name) for key, name in ranking_metrics.FIGURES.items() if key != headline]
    return [(ranking[headline], ranking_metrics.FIGURES[headline]),
            (ranking["popularity"][headline], "the same of the most popular items"), *others]  # fmt: skip


def _slices(report: Record) -> list[tuple[Any, ...]]:
    return [(SLICES.get(name, name), s["rows"], s["rmse"], s["mae"]) for name, s in report["slices"].items()]


def _beside(report: Record) -> list[tuple[Any, ...]]:
    final = report["final"]
    if final["val_rmse"] is None and not report["floors"]:
        return []
    rows = [("this model", final["val_rmse_clipped"], final.get("val_mae_clipped"))]
    return rows + [(FLOORS.get(name, name), f["rmse"], f["mae"]) for name, f in report["floors"].items()]


def _ranking(report: Record) -> dict[str, Any]:
    """What the template shows of the ranking, where it was measured."""
    ranking = report.get("ranking")
    if not ranking:
        return {"ranking": None}
    return {"ranking": ranking_metrics.rows({"this model": ranking}), "ranking_of": ranking_metrics.basis(ranking),
            "ranking_head": ["", *ranking_metrics.FIGURES.values()]}  # fmt: skip


def _validated(epoch: Record, ranked: bool) -> list[float | None]:
    if ranked:
        return [epoch["val_ndcg"]]
    return [epoch.get("val_rmse_clipped", epoch["val_rmse"]), epoch.get("val_mae_clipped", epoch["val_mae"])]


def _epochs(report: Record, records: Sequence[Record]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names and rows of the table of epochs: columns that have a value, and nothing where no epoch's error is known."""
    validated = {r["epoch"]: r.get("validation_seconds") for r in records if r["kind"] == "epoch"}
    ranked = bool(report["epochs"]) and "val_ndcg" in report["epochs"][0]
    errors = ("train error", "NDCG@10") if ranked else ("train RMSE", "val RMSE, clipped", "val MAE, clipped")
    rows = [(e["epoch"], e["train_rmse"], *_validated(e, ranked), seconds_in_words(e["seconds"]),
             seconds_in_words(validated[e["epoch"]]) if validated.get(e["epoch"]) is not None else None,
             f"{e['ratings_per_second'] / 1e6:.3g}") for e in report["epochs"]]  # fmt: skip
    names = ["epoch", *errors, "time", "to validate", "M ratings/s"]
    kept = [k for k in range(len(names)) if any(row[k] is not None for row in rows)]
    if not set(kept) & set(range(1, 1 + len(errors))):
        return [], []
    return [names[k] for k in kept], [tuple(row[k] for k in kept) for row in rows]


def _events(records: Sequence[Record]) -> list[tuple[str, str]]:
    words = {"start": "begun", "resume": "restarted", "checkpoint": "checkpoint", "stop": "stopped on request",
             "finish": "finished"}  # fmt: skip
    shown = [r for r in records if r["kind"] in words]
    if len(shown) > 60:
        shown = [r for r in shown if r["kind"] != "checkpoint"][-60:]
    return [(day(r["time"]), f"{words[r['kind']]}, step {r.get('step', 0):,}"
             + (f", {r['world_size']} ranks" if r.get("world_size", 1) > 1 else "")) for r in shown]  # fmt: skip


def _command(report: Record, run: str) -> str:
    job = JOBS.get(report["job"], report["job"])
    launch = f"mfdist launch --nproc-per-node={report['world_size']} {job}" if report["world_size"] > 1 else (
        f"mfdist {job}")  # fmt: skip
    return f"{launch} --config {shlex.quote(run.rstrip('/') + '/config.toml')} --run-dir runs/again"

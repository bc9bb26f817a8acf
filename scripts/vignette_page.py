"""The vignette's figures beside ours: OUT/vignette.png and OUT/index.html of what scripts/reproduce has left in OUT.

    python scripts/vignette_page.py runs/reproduce-twin

Left stands what the vignette printed (its plots are not shipped; points are its numbers), right what was found here.
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reproduce import allowed_text, number_text, read_json
from vignette import CURVES, HISTOGRAM, TOP_USERS, USERS, USERS_OF_50

from mfdist.data.dataset import Dataset
from mfdist.metrics import round_to_scale
from mfdist.results.export import ExportedModel
from mfdist.results.floors import lane_rows

STARS = np.arange(1, 6)
THEIRS, OURS, TRAIN = "#c0603a", "#1f5fbf", "#8a93a6"


def main(argv: Sequence[str]) -> int:
    out = Path(argv[0])
    result = json.loads((out / "result.json").read_text())
    reports = {name: read_json(out / name / "report.json") for name in result["runs"]}
    dataset = Dataset.open(str(out / "data"))
    plot = draw(result, reports, dataset, str(out / "mf_advanced"))
    (out / "vignette.png").write_bytes(plot)
    (out / "index.html").write_text(page(result, reports, plot))
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


def draw(result: dict[str, Any], reports: dict[str, Any], dataset: Dataset, advanced: str) -> bytes:
    """Five rows of panels, the vignette's left and ours right: a PNG."""
    figure = Figure(figsize=(13, 22), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(5, 2)
    ours = "this run, SYNTHETIC ratings" if result["synthetic"] else "this run"
    _draw_histograms(panels[0], dataset, ours)
    _draw_users(panels[1], ratings_per_user(dataset), ours)
    for row, name in zip(panels[2:4], CURVES, strict=True):
        _draw_curves(row, name, reports[name]["epochs"], ours)
    _draw_rounding(panels[4], rounded_against_ratings(dataset, advanced), ours)
    for axes in panels[:4].flat:
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _draw_histograms(panels: Any, dataset: Dataset, ours: str) -> None:
    found = dataset.manifest.rating_histogram
    for axes, (values, counts), colour, title in (
        (panels[0], (STARS, np.array(HISTOGRAM)), THEIRS, "vignette"),
        (panels[1], tuple(np.array(found).T), OURS, ours),
    ):
        bars = axes.bar(values, counts, color=colour, width=0.8)
        axes.bar_label(bars, [f"{count:,.0f}" for count in counts], fontsize=9)
        axes.set(title=f"Ratings ({title})", xlabel="stars", ylabel="ratings")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xticks(values)


def _draw_users(panels: Any, counts: np.ndarray[Any, Any], ours: str) -> None:
    degree, users = np.unique(counts[counts > 0], return_counts=True)
    at_least = users[::-1].cumsum()[::-1]
    theirs = [(1, USERS), (50, USERS_OF_50), *((top, rank) for rank, top in reversed(list(enumerate(TOP_USERS, 1))))]
    for axes, title in zip(panels, ("vignette's file: totals, and its ten most active users", ours), strict=True):
        if axes is panels[1]:
            axes.loglog(degree, at_least, ".", color=OURS, markersize=4, label="this run")
        axes.loglog(*zip(*theirs, strict=True), "o", color=THEIRS, markersize=6, fillstyle="none", label="vignette")
        axes.set(title=f"Ratings per user ({title})", xlabel="ratings", ylabel="users with at least so many ratings")
        axes.set(xlim=(0.8, 1000), ylim=(0.6, 1e7))
        axes.legend(frameon=False)


def _draw_curves(panels: Any, name: str, epochs: list[dict[str, Any]], ours: str) -> None:
    published = CURVES[name]
    for key, colour, label, style in (("train_rmse", TRAIN, "training", "s"), ("val_rmse", OURS, "validation", "o")):
        printed = published[key]
        panels[0].plot(list(printed), list(printed.values()), style, color=colour, label=f"{label}, as printed")
        for epoch, value in printed.items():
            above = 7 if key == "train_rmse" else -16
            panels[0].annotate(f"{value:g}", (epoch, value), (0, above), textcoords="offset points", ha="center")
        values = [epoch[key] for epoch in epochs]
        panels[1].plot(range(len(values)), values, f"{style}-", color=colour, label=label, markersize=5)
        panels[1].plot(list(printed), list(printed.values()), "o", color=THEIRS, fillstyle="none", markersize=10,
                       label="vignette, as printed" if key == "val_rmse" else None)  # fmt: skip
    high = 8 if name == "mf" else 1.8
    for axes, title in zip(panels, ("vignette", ours), strict=True):
        axes.set(
            title=f"{name}: RMSE by epoch ({title})", xlabel="epoch", ylabel="RMSE", ylim=(0, high), xlim=(-0.5, 9.5)
        )
        axes.set_xticks(range(10))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, loc="lower left")


def _draw_rounding(panels: Any, table: np.ndarray[Any, Any], ours: str) -> None:
    edges = np.array([0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    panels[0].stairs(STARS, edges, color=THEIRS, linewidth=2, baseline=None)
    panels[0].set(title="Rounding to whole stars (vignette's step function)", xlabel="prediction", ylabel="rounded")
    panels[0].set(xlim=(0.3, 5.7), ylim=(0.5, 5.5))
    panels[0].spines[["top", "right"]].set_visible(False)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    panels[1].imshow(share, cmap="Blues", vmin=0, vmax=1, origin="lower", extent=(0.5, 5.5, 0.5, 5.5), aspect="auto")
    for rating in STARS:
        for star in STARS:
            value = share[rating - 1, star - 1]
            panels[1].text(star, rating, f"{value:.1%}", ha="center", va="center",
                           color="white" if value > 0.55 else "black")  # fmt: skip
    panels[1].set(title=f"mf_advanced, rounded ({ours})", xlabel="prediction, rounded",
                  ylabel="rating (each row adds up to 100%)")  # fmt: skip
    for axes in panels:
        axes.set_xticks(STARS)
        axes.set_yticks(STARS)


# The page -----------------------------------------------------------------------------------------

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2330;background:#f5f6f8;margin:0}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0}h2{font-size:17px;margin:36px 0 10px}p{color:#5c6675;margin:4px 0 16px}
p.synthetic{background:#fff4d6;border:1px solid #e6c765;border-radius:8px;padding:10px 16px;color:#6b5200}
table{border-collapse:collapse;background:#fff;border:1px solid #e1e5eb;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border-top:1px solid #edf0f4}
th{font-weight:600;color:#5c6675;font-size:13px}
th:first-child,td:first-child,.checks td:nth-child(2),.checks th:nth-child(2){text-align:left}
tr.pass td:last-child{color:#1a7f45}tr.FAIL td{background:#fdecea}tr.FAIL td:last-child{color:#b3261e;font-weight:600}
tr.not td{color:#8a93a6}
img{width:100%;background:#fff;border:1px solid #e1e5eb;border-radius:8px}
"""


def page(result: dict[str, Any], reports: dict[str, Any], plot: bytes) -> str:
    """One page that needs no other file and no network."""
    title = "The vignette, reproduced" + (" on synthetic ratings" if result["synthetic"] else "")
    note = ""
    if result["synthetic"]:
        floor = result["noise_floor"]
        note = (
            '<p class="synthetic"><b>Synthetic.</b> These ratings were made from a seed to be like the vignette\'s '
            "file in size, marginals and difficulty. Sizes and speeds are measurements; accuracy figures say nothing "
            "about real ratings, and only what the twin was made to meet is judged. Noise floor of the truth: RMSE "
            f"{floor['rmse']:.4f}, MAE {floor['mae']:.4f}.</p>"
        )
    if result["quick"]:
        note += "<p>A quick run of the machinery: fewer epochs, nothing is judged.</p>"
    image = base64.b64encode(plot).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1><p>{html.escape(result["source"])}: {result["ratings"]:,} ratings</p>{note}
<h2>Number by number</h2>{_checks(result["checks"])}
<h2>All models on the same validation rows</h2>{_models(reports)}
<h2>Figures</h2><img alt="the vignette's figures and ours" src="data:image/png;base64,{image}">
<h2>What it took</h2>{_steps(result["steps"])}
</main></body></html>
"""


def _checks(checks: list[dict[str, Any]]) -> str:
    rows = [
        (entry["verdict"].split()[0],
         (entry["of"], entry["what"], number_text(entry["published"], entry["published"]),
          number_text(entry["ours"], entry["published"]), allowed_text(entry["tolerance"]), entry["verdict"]))
        for entry in checks
    ]  # fmt: skip
    return _table(("", "", "vignette", "here", "allowed", "verdict"), rows, "checks")


def _models(reports: dict[str, Any]) -> str:
    rows = []
    for name, report in reports.items():
        final = report["final"]
        rows.append(("", (name, f"{final['val_rmse_clipped']:.4f}", f"{final['val_mae_clipped']:.4f}",
                          f"{final['val_rmse']:.4f}", f"{final['val_rmse_rounded']:.4f}",
                          f"{report['wall_seconds']:.0f}")))  # fmt: skip
    for name, floor in reports["mf"]["floors"].items():
        rows.append(("not", (name.replace("_", " "), f"{floor['rmse']:.4f}", f"{floor['mae']:.4f}", "", "", "")))
    return _table(("last epoch", "RMSE, clipped", "MAE, clipped", "RMSE", "RMSE, rounded", "seconds"), rows)


def _steps(steps: dict[str, dict[str, float]]) -> str:
    rows = [("", (name, f"{used['seconds']:.1f}", f"{used['peak_rss_bytes'] / 2**30:.2f}"))
            for name, used in steps.items()]  # fmt: skip
    return _table(("step", "seconds", "peak GiB"), rows)


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], name: str = "") -> str:
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += [f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
              for kind, cells in rows]  # fmt: skip
    return f'<table class="{name}">' + "\n".join(lines) + "</table>"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

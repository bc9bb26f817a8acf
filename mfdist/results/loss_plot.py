"""RUN/loss.png: the error by epoch with the floors, or, of a run without a curve, its error beside theirs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from mfdist.results.ranking_metrics import FIGURES, HEADLINE
from mfdist.results.run_page import FLOORS, validation_curve

TRAIN_COLOUR, VAL_COLOUR = "#6b7587", "#1f5fbf"
FLOOR_STYLES = (("#b3362b", "--"), ("#96700a", ":"), ("#b4531f", "-."))


def loss_plot(report: Mapping[str, Any]) -> bytes:
    """A PNG. RMSE of training (running) and validation by epoch; the legend stands beside the curves, not on them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(e["epoch"], e["train_rmse"]) for e in report["epochs"] if e["train_rmse"] is not None]
    curves = {"train_rmse": trained, "val_rmse": validation_curve(report)}
    if report["config"].get("objective") == "ranking":
        _draw_ranking(axes, report)
    elif max(map(len, curves.values())) >= 2:
        _draw_curves(axes, curves, report["floors"])
    else:
        _draw_bars(axes, report)
    axes.set(title=f"{report['model']} on {report['dataset']['name']}".replace("$", r"\$"))
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144)
    return stream.getvalue()


def _draw_ranking(axes: Any, report: Mapping[str, Any]) -> None:
    """NDCG by epoch, and that of the most popular items."""
    name = FIGURES[HEADLINE]
    points = [(epoch["epoch"], epoch["val_ndcg"]) for epoch in report["epochs"] if epoch["val_ndcg"] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, color=VAL_COLOUR, label="this model", linewidth=2)
        popular = report["ranking"]["popularity"][HEADLINE]
        axes.axhline(popular, color=TRAIN_COLOUR, linestyle="--", linewidth=1.2, label="most popular items")
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set(xlabel="epoch", ylabel=f"{name} on validation")


def _draw_curves(axes: Any, curves: Mapping[str, list[tuple[int, float]]], floors: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, colour, label in (("train_rmse", TRAIN_COLOUR, "training (running)"),
                               ("val_rmse", VAL_COLOUR, "validation, clipped")):  # fmt: skip
        if curves[key]:
            axes.plot(*zip(*curves[key], strict=True), "o-", markersize=4, color=colour, label=label, linewidth=2)
    for (name, floor), (colour, style) in zip(floors.items(), FLOOR_STYLES, strict=False):
        if floor["rmse"] is not None:
            label = f"{FLOORS.get(name, name)} {floor['rmse']:.4f}"
            axes.axhline(floor["rmse"], color=colour, linestyle=style, linewidth=1.2, label=label)
    axes.set(xlabel="epoch", ylabel="RMSE")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_bars(axes: Any, report: Mapping[str, Any]) -> None:
    """The run's clipped RMSE beside the floors, from best to worst."""
    rows = [(report["model"], report["final"]["val_rmse_clipped"])]
    rows += [(FLOORS.get(name, name), floor["rmse"]) for name, floor in report["floors"].items()]
    known = sorted(((name, value) for name, value in rows if value is not None), key=lambda row: -row[1])
    colours = [VAL_COLOUR if name == report["model"] else TRAIN_COLOUR for name, _ in known]
    bars = axes.barh([name for name, _ in known], [value for _, value in known], color=colours, height=0.6)
    axes.bar_label(bars, [f" {value:.4f}" for _, value in known])
    axes.set(xlabel="RMSE on validation rows, clipped to the scale")
    axes.margins(x=0.12)

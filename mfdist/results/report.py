"""The result of a run: report.json for programs, report.html and loss.png for people, the figures on the model card.

Training and the baseline write the same keys (:data:`KEYS`), so that every tool reads both.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mfdist import __version__, storage
from mfdist.data.dataset import Manifest
from mfdist.results import export

KEYS = (
    "job", "model", "dataset", "world_size", "device", "seed", "config", "epochs", "final", "best_on_val", "slices",
    "floors", "wall_seconds", "peak_rss_bytes", "peak_device_bytes", "versions",
)  # fmt: skip
EPOCH_KEYS = ("epoch", "train_rmse", "val_rmse", "val_mae", "seconds", "ratings_per_second")
RESULT_KEYS = ("epoch", "val_rmse", "val_mae", "val_rmse_rounded", "val_mae_rounded", "val_rmse_clipped", "how_chosen")
BEST_CHOICE = "lowest validation RMSE, the vignette's convention: picked on the rows it is reported on"


def new_report(
    *,
    job: str,
    model: str,
    manifest: Manifest,
    world_size: int,
    device: str,
    seed: int,
    config: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    final: Mapping[str, Any],
    best_on_val: Mapping[str, Any],
    slices: Mapping[str, Any],
    floors: Mapping[str, Any],
    wall_seconds: float,
    peak_rss_bytes: int | None = None,
    peak_device_bytes: int = 0,
) -> dict[str, Any]:
    """report.json's table. ``epochs``: dicts of EPOCH_KEYS; ``final`` and ``best_on_val``: made by :func:`result`.

    ``slices`` is SliceSums.summary()["slices"], ``floors`` evaluate.floors(). ``peak_rss_bytes``: the largest of all
    ranks; this process's where not given. NaN and infinities become null.
    """
    for epoch in epochs:
        assert set(EPOCH_KEYS) <= set(epoch), f"an epoch lacks {set(EPOCH_KEYS) - set(epoch)}"
    for figures in (final, best_on_val):
        assert set(RESULT_KEYS) <= set(figures), f"a result lacks {set(RESULT_KEYS) - set(figures)}"
    report = {
        "job": job,
        "model": model,
        "dataset": {
            "name": manifest.name, "fingerprint": manifest.fingerprint, "num_users": manifest.num_users,
            "num_items": manifest.num_items, "num_ratings": dict(manifest.num_ratings),
        },
        "world_size": world_size,
        "device": device,
        "seed": seed,
        "config": dict(config),
        "epochs": [dict(epoch) for epoch in epochs],
        "final": dict(final),
        "best_on_val": dict(best_on_val),
        "slices": dict(slices),
        "floors": dict(floors),
        "wall_seconds": wall_seconds,
        "peak_rss_bytes": peak_rss() if peak_rss_bytes is None else peak_rss_bytes,
        "peak_device_bytes": peak_device_bytes,
        "versions": versions(),
    }  # fmt: skip
    finite: dict[str, Any] = _finite(report)
    return finite


def result(epoch: int, headline: Mapping[str, Any], how_chosen: str) -> dict[str, Any]:
    """``final`` or ``best_on_val``: an epoch (from 1), SliceSums.summary()["headline"] of it, and why this epoch."""
    return {"epoch": epoch, **headline, "how_chosen": how_chosen}


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of mfdist, Python and of the libraries that the figures depend on, where they are installed."""
    found = {"mfdist": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "pyarrow", "polars", "scikit-surprise"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_report(run: str, report: Mapping[str, Any]) -> None:
    """Write RUN/report.json, report.html, loss.png and, where there is an export, its model card; one rank calls."""
    assert set(report) == set(KEYS), f"keys differ: {set(report) ^ set(KEYS)}"
    plot = loss_plot(report)
    storage.write_bytes(storage.join(run, "loss.png"), plot)
    storage.write_text(storage.join(run, "report.html"), report_html(report, plot))
    export.write_card(run, report)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    storage.write_text(storage.join(run, "report.json"), text)


# Figures ------------------------------------------------------------------------------------------

_TRAIN_COLOUR, _VAL_COLOUR, _FLOOR_COLOUR = "#8a93a6", "#1f5fbf", "#c0392b"


def loss_plot(report: Mapping[str, Any]) -> bytes:
    """RMSE of training (running) and validation by epoch, with the floors as lines: a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, colour, label in (
        ("train_rmse", _TRAIN_COLOUR, "training (running)"),
        ("val_rmse", _VAL_COLOUR, "validation"),
    ):
        points = [(epoch["epoch"], epoch[key]) for epoch in report["epochs"] if epoch[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label, linewidth=2)
    for (name, floor), style in zip(report["floors"].items(), ("--", ":", "-."), strict=False):
        if floor["rmse"] is not None:
            label = f"floor: {name.replace('_', ' ')} {floor['rmse']:.4f}"
            axes.axhline(floor["rmse"], color=_FLOOR_COLOUR, linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="epoch", ylabel="RMSE", title=f"{report['model']} on {report['dataset']['name']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=144)
    return stream.getvalue()


# The page -----------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2330;background:#f5f6f8;margin:0}
main{max-width:960px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0}h2{font-size:17px;margin:36px 0 10px}
p.sub{color:#5c6675;margin:4px 0 24px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.card{background:#fff;border:1px solid #e1e5eb;border-radius:8px;padding:14px 16px}
.card b{display:block;font-size:25px;font-weight:600;font-variant-numeric:tabular-nums}
.card span{color:#5c6675;font-size:13px}
table{border-collapse:collapse;background:#fff;border:1px solid #e1e5eb;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-top:1px solid #edf0f4}
th{font-weight:600;color:#5c6675;font-size:13px}th:first-child,td:first-child{text-align:left}
tr.own td{font-weight:600;background:#eef4fd}
img{width:100%;background:#fff;border:1px solid #e1e5eb;border-radius:8px}
details{margin-top:36px}code{font-size:13px;overflow-wrap:anywhere}
"""


def report_html(report: Mapping[str, Any], plot: bytes) -> str:
    """One page that needs no other file and no network."""
    data, final, best = report["dataset"], report["final"], report["best_on_val"]
    title = f"{report['model']} on {data['name']}"
    subtitle = (
        f"{data['num_ratings']['train']:,} training and {data['num_ratings']['val']:,} validation ratings, "
        f"{data['num_users']:,} users, {data['num_items']:,} items; {report['world_size']} "
        f"{'rank' if report['world_size'] == 1 else 'ranks'} on {report['device']}, seed {report['seed']}, "
        f"{report['wall_seconds']:.1f} s"
    )
    cards = [("validation RMSE", final["val_rmse"]), ("validation MAE", final["val_mae"]),
             ("RMSE, clipped to the scale", final["val_rmse_clipped"]),
             ("RMSE, rounded to the scale", final["val_rmse_rounded"])]  # fmt: skip
    beside = [("this model (clipped)", final["val_rmse_clipped"], final.get("val_mae_clipped"))]
    beside += [(f"floor: {name.replace('_', ' ')}", f["rmse"], f["mae"]) for name, f in report["floors"].items()]
    slices = [(name.replace("_", " "), s["rows"], s["rmse"], s["mae"]) for name, s in report["slices"].items()]
    epochs = [[epoch[key] for key in EPOCH_KEYS] for epoch in report["epochs"]]
    image = base64.b64encode(plot).decode()
    config = [(key, "" if value is None else str(value)) for key, value in report["config"].items()]
    used = [("peak memory of a rank, bytes", report["peak_rss_bytes"]),
            ("peak device memory, bytes", report["peak_device_bytes"]), *report["versions"].items()]  # fmt: skip
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>
<div class="cards">{"".join(f'<div class="card"><b>{_cell(v)}</b><span>{k}</span></div>' for k, v in cards)}</div>
<p class="sub">Epoch {final["epoch"]}: {html.escape(str(final["how_chosen"]))}. For comparison only, epoch
{best["epoch"]} has validation RMSE {_cell(best["val_rmse"])} ({html.escape(str(best["how_chosen"]))}).</p>
<h2>Error by epoch</h2><img alt="RMSE by epoch" src="data:image/png;base64,{image}">
<h2>Beside simple predictions</h2>{_table(("", "RMSE", "MAE"), beside, own=0)}
<h2>Where the error is</h2>{_table(("validation rows", "rows", "RMSE", "MAE"), slices)}
<h2>Epochs</h2>{_table([key.replace("_", " ") for key in EPOCH_KEYS], epochs)}
<details><summary>Configuration</summary>{_table(("key", "value"), config)}</details>
<details><summary>Resources and versions</summary>{_table(("", ""), used)}
<p><code>dataset {html.escape(data["fingerprint"])}</code></p></details>
</main></body></html>
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], own: int | None = None) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    for number, row in enumerate(rows):
        mark = ' class="own"' if number == own else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return html.escape(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None (JSON has neither) and tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value

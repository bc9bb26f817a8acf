"""DATA/report: what a dataset looks like, as PNG figures and one page that holds them all."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist import storage
from mfdist.data.dataset import Manifest

MOST_BARS = 50
FIRST_DAY, END_DAY = -365_000, 2_900_000
"""Days since 1970 that a plot can show: the years 970 to 9909."""
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td{padding:.15rem 1.2rem .15rem 0}td+td{text-align:right;"
    "font-variant-numeric:tabular-nums}img{max-width:30rem;width:100%}"
    "figure{display:inline-block;margin:.5rem 0}figcaption{color:#555}"
)


def write_dataset_report(
    root: str,
    manifest: Manifest,
    user_activity: dict[int, int],
    item_ratings: npt.NDArray[np.int64],
    days: dict[int, int],
) -> None:
    """The figures and index.html.

    ``user_activity``: ratings of a user -> users; ``days``: day since 1970 -> ratings.
    """
    items = item_ratings[item_ratings > 0]
    found, number = np.unique(items, return_counts=True)
    item_activity = dict(zip(found.tolist(), number.tolist(), strict=True))
    title = f"{manifest.name}{' (synthetic)' if manifest.extra.get('synthetic') else ''}"
    figures = [
        ("ratings.png", "Ratings", _bars(manifest.rating_histogram, f"Ratings, {title}")),
        ("ratings_per_user.png", "Ratings per user (log-log)",
         _points(user_activity, f"Ratings per user, {title}", "ratings of a user", "users")),
        ("ratings_per_item.png", "Training ratings per item (log-log)",
         _points(item_activity, f"Ratings per item, {title}", "ratings of an item", "items")),
    ]  # fmt: skip
    if days:
        figures.append(("activity.png", "Ratings by month", _months(days, f"Ratings by month, {title}")))
    for name, _, content in figures:
        storage.write_bytes(storage.join(root, "report", name), content)
    storage.write_text(storage.join(root, "report", "index.html"), _page(manifest, title, figures))


def _page(manifest: Manifest, title: str, figures: list[tuple[str, str, bytes]]) -> str:
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in _facts(manifest))
    images = "".join(
        f'<figure><img alt="{caption}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{caption}</figcaption></figure>"
        for _, caption, content in figures
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><table>{rows}</table>{images}</html>\n"
    )


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    train, val = manifest.num_ratings["train"], manifest.num_ratings["val"]
    cold = manifest.extra["cold"]

    def share(count: int) -> str:
        return f"{count:,} ({count / max(val, 1):.1%})"

    facts = [
        ("training ratings", f"{train:,}"), ("validation ratings", f"{val:,}"), ("users", f"{manifest.num_users:,}"),
        ("items", f"{manifest.num_items:,}"), ("mean training rating", f"{manifest.global_mean:.4f}"),
        ("scale", f"{manifest.rating_scale[0]:g} to {manifest.rating_scale[1]:g}, step {manifest.rating_step:g}"),
        ("validation rows of users without training ratings", share(cold["cold_user"])),
        ("validation rows of items without training ratings", share(cold["cold_item"])),
        ("validation rows of both", share(cold["cold_both"])),
        ("rows filtered", f"{manifest.filtered:,}"), ("duplicates merged", f"{manifest.merged:,}"),
    ]  # fmt: skip
    facts += [(f"rejected: {reason}", f"{count:,}") for reason, count in sorted(manifest.rejected.items())]
    facts += [(f"source {s['path']}", f"{s['rows']:,} rows") for s in manifest.sources[:50]]
    return [*facts, ("fingerprint", manifest.fingerprint)]


def _png(draw: Any, title: str, x: str, y: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set(title=title.replace("$", r"\$"), xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()


def _bars(histogram: list[tuple[float, int]], title: str) -> bytes:
    values = np.array([value for value, _ in histogram])
    counts = np.array([count for _, count in histogram])
    if values.size > MOST_BARS:  # bars as thin as their distance would not be seen
        counts, edges = np.histogram(values, MOST_BARS, weights=counts)
        values = (edges[:-1] + edges[1:]) / 2
    width = 0.85 * float(np.diff(values).min()) if values.size > 1 else 0.8

    def draw(axes: Any) -> None:
        axes.bar(values, counts, width=width, color="#4477aa")
        _count_axis(axes)
        if values.size <= 12:
            axes.set_xticks(values)

    return _png(draw, title, "rating", "ratings")


def _points(activity: dict[int, int], title: str, x: str, y: str) -> bytes:
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: Any) -> None:
        axes.loglog(list(activity), list(activity.values()), ".", color="#4477aa", markersize=4)
        for axis, values in ((axes.xaxis, list(activity)), (axes.yaxis, list(activity.values()))):
            low, high = min(values, default=1), max(values, default=1)
            axis.axes.set(**{f"{axis.axis_name}lim": (0.8 * low, 1.25 * max(high, 1.5 * low))})
            axis.set_major_locator(LogLocator(10, (1,) if high > 200 * low else (1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
            axis.set_minor_formatter(NullFormatter())

    return _png(draw, title, x, y)


def _months(days: dict[int, int], title: str) -> bytes:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, DateFormatter

    found = np.array(sorted(days), np.int64)
    counts = np.array([days[int(day)] for day in found], np.int64)
    usable = (found >= FIRST_DAY) & (found < END_DAY)
    months = found[usable].astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    at, place = np.unique(months, return_inverse=True)
    total = np.bincount(place, weights=counts[usable], minlength=at.size) if at.size else np.zeros(0)

    def draw(axes: Any) -> None:
        dates = at.astype("datetime64[M]").astype("datetime64[D]")
        axes.plot(dates, total, color="#4477aa", marker="o" if at.size <= 24 else None, markersize=4)
        locator = AutoDateLocator(minticks=3, maxticks=8)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        if at.size <= 6:  # nothing finer than months
            axes.set_xticks(dates)
            axes.xaxis.set_major_formatter(DateFormatter("%b %Y"))  # type: ignore[no-untyped-call]
        _count_axis(axes)
        axes.set_ylim(bottom=0)

    return _png(draw, title, "month", "ratings in a month")


def _count_axis(axes: Any) -> None:
    """Whole numbers, thousands set apart, on the vertical axis."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

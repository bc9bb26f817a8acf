"""DATA/report: what a dataset looks like, as PNG figures and as one page with figures of its own."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist import __version__, storage
from mfdist.data.dataset import Manifest
from mfdist.pages.charts import Series, bar_chart, line_chart
from mfdist.pages.page import render

MOST_BARS = 50
FIRST_DAY, END_DAY = -365_000, 2_900_000
"""Days since 1970 that a plot can show: the years 970 to 9909."""


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
        ("ratings.png", _bars(manifest.rating_histogram, f"Ratings, {title}")),
        ("ratings_per_user.png",
         _points(user_activity, f"Ratings per user, {title}", "ratings of a user", "users")),
        ("ratings_per_item.png",
         _points(item_activity, f"Ratings per item, {title}", "ratings of an item", "items")),
    ]  # fmt: skip
    if days:
        figures.append(("activity.png", _months(days, f"Ratings by month, {title}")))
    for name, content in figures:
        storage.write_bytes(storage.join(root, "report", name), content)
    storage.write_text(
        storage.join(root, "report", "index.html"), _page(manifest, title, user_activity, item_activity, days)
    )


def _page(
    manifest: Manifest, title: str, users: dict[int, int], items: dict[int, int], days: dict[int, int]
) -> str:  # fmt: skip
    train, val = manifest.num_ratings["train"], manifest.num_ratings["val"]
    low, high = manifest.rating_scale
    cold = manifest.extra["cold"]
    names = {"cold_user": "of users without training ratings", "cold_item": "of items without training ratings",
             "cold_both": "of both"}  # fmt: skip
    rejected = [(f"rejected: {reason}", count) for reason, count in sorted(manifest.rejected.items())]
    cells = max(manifest.num_users * manifest.num_items, 1)
    return render(
        "dataset.html", title=title, manifest=manifest, synthetic=bool(manifest.extra.get("synthetic")),
        cards_=[(train + val, "ratings"), (manifest.num_users, "users"), (manifest.num_items, "items"),
                (manifest.global_mean, f"mean training rating, on a scale of {low:g} to {high:g}"),
                (f"{(train + val) / cells:.2%}", "of all pairs are rated")],
        figures=_figures(manifest, users, items, days),
        accounts=[("training", train), ("validation", val), ("filtered", manifest.filtered),
                  ("duplicates merged", manifest.merged), *rejected],
        cold=[(text, cold[name], f"{cold[name] / max(val, 1):.1%}") for name, text in names.items()],
        sources=[(source["path"], source["rows"]) for source in manifest.sources[:50]],
        footer=f"mfdist {__version__}",
    )  # fmt: skip


def _figures(
    manifest: Manifest, users: dict[int, int], items: dict[int, int], days: dict[int, int]
) -> list[tuple[str, Any, str]]:
    values, counts = _few_bars(manifest.rating_histogram)
    found = [("Ratings", bar_chart([(f"{v:.3g}", n) for v, n in zip(values, counts, strict=True)], "rating", "ratings"),
              "")]  # fmt: skip
    for name, activity, tone in (("user", users, "a"), ("item", items, "c")):
        points = [(float(degree), float(number)) for degree, number in sorted(activity.items()) if degree > 0]
        if len(points) > 1:
            what = "ratings" if name == "user" else "training ratings"
            chart = line_chart([Series(f"{name}s", points, tone, "dots")], f"{what} of a {name}".replace("a i", "an i"),
                               f"{name}s", log_x=True, log_y=True)  # fmt: skip
            found.append((f"{what.capitalize()} per {name}", chart, "Both axes are logarithmic."))
    months, total = _by_month(days)
    if len(months) > 1:
        years = [1970 + int(month) / 12 for month in months]
        chart = line_chart([Series("ratings", list(zip(years, total.tolist(), strict=True)), "d", "plain")], "year",
                           "ratings in a month", from_zero=True, years=True)  # fmt: skip
        found.append(("Ratings by month", chart, ""))
    return found


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
    values, counts = _few_bars(histogram)
    width = 0.85 * float(np.diff(values).min()) if values.size > 1 else 0.8

    def draw(axes: Any) -> None:
        axes.bar(values, counts, width=width, color="#4477aa")
        _count_axis(axes)
        if values.size <= 12:
            axes.set_xticks(values)

    return _png(draw, title, "rating", "ratings")


def _few_bars(histogram: list[tuple[float, int]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Values and counts of at most MOST_BARS bars."""
    values = np.array([value for value, _ in histogram], np.float64)
    counts = np.array([count for _, count in histogram], np.float64)
    if values.size > MOST_BARS:  # bars as thin as their distance would not be seen
        counts, edges = np.histogram(values, MOST_BARS, weights=counts)
        values = (edges[:-1] + edges[1:]) / 2
    return values, counts


def _by_month(days: dict[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Months since January 1970 that can be shown, and the ratings of each."""
    found = np.array(sorted(days), np.int64)
    counts = np.array([days[int(day)] for day in found], np.int64)
    usable = (found >= FIRST_DAY) & (found < END_DAY)
    months = found[usable].astype("datetime64[D]").astype("datetime64[M]").astype(np.int64)
    at, place = np.unique(months, return_inverse=True)
    return at, np.bincount(place, weights=counts[usable], minlength=at.size).astype(np.float64)


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

    at, total = _by_month(days)

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

"""RUN/tune.html: a search as a person looks at it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from mfdist import __version__
from mfdist.pages.charts import Level, Series, line_chart
from mfdist.pages.page import day, render
from mfdist.tuning.results import Results, Trial, train_command
from mfdist.tuning.space import Parameter

Figure = tuple[str, Markup, str]
SHOWN_TRIALS = 12
"""Rows of the table that is open."""
HELD_OUT = {"random": "a share of them by chance", "time": "the latest of them", "last-n": "the last of each user"}


def search_page(results: Results, data: str, run: str) -> str:
    """``data``, ``run``: as they were given, for the command."""
    finished = sorted((t for t in results.trials if t.error is not None), key=lambda t: t.error or 0.0)
    figures = [best_so_far(results, finished), *(against(results, one, finished) for one in results.parameters)]
    return render(
        "tune.html", title=f"Search on {results.dataset}", results=results, figures=figures, cards_=_cards(results),
        settings=_settings(results), head=_head(results), rows=[_row(results, t) for t in finished[:SHOWN_TRIALS]],
        every=[_row(results, t) for t in results.trials], command=train_command(data, run),
        seconds=sum(trial.seconds for trial in results.trials), held_out=HELD_OUT[results.split_kind],
        footer=f"mfdist {__version__}, {day(time.time())}",
    )  # fmt: skip


def best_so_far(results: Results, finished: Sequence[Trial]) -> Figure:
    """Each trial that came to its end, and the best up to there; nothing of fewer than two."""
    shown, note = _without_the_worst(results, finished)
    if len(shown) < 2:
        return "Best so far", Markup(""), ""
    measure, lowest, best = results.measure, math.inf, list[tuple[float, float]]()
    for trial in results.trials:
        lowest = min(lowest, math.inf if trial.error is None else trial.error)
        if any(lowest == one.error for one in shown):
            best.append((trial.number, measure.figure(lowest)))
    points = [(t.number, measure.figure(t.error or 0.0)) for t in shown]
    series = [Series("a trial", points, "b", "dots"), Series("best so far", best, "a", "plain")]
    start = results.start
    levels = [Level(measure.figure(start.error), "where it began", "c")] if start and start.error is not None else []
    return "Best so far", line_chart(series, "trial", measure.label, levels=levels, whole_x=True), note


def against(results: Results, one: Parameter, finished: Sequence[Trial]) -> Figure:
    """A setting against the error, the best trial as a ring."""
    title = one.flag
    shown, note = _without_the_worst(results, finished)
    if len(shown) < 2 or results.best is None:
        return title, Markup(""), ""

    def point(trial: Trial) -> tuple[float, float]:
        return one.number(trial.values[one.name]), results.measure.figure(trial.error or 0.0)

    series = [Series("a trial", [point(t) for t in shown], "b", "dots"),
              Series("the best", [point(results.best)], "a", "rings")]  # fmt: skip
    label = f"{title}, times what it was" if one.times else title
    names = [one.shown(choice) for choice in one.choices]
    chart = line_chart(series, label, results.measure.label, log_x=one.logarithmic, names=names,
                       whole_x=one.whole and not one.logarithmic)  # fmt: skip
    return title, chart, note


def _without_the_worst(results: Results, finished: Sequence[Trial]) -> tuple[list[Trial], str]:
    """The trials whose differences can be seen beside each other, and what was left out."""
    errors = [trial.error or 0.0 for trial in finished]
    if len(errors) < 5:
        return list(finished), ""
    limit = errors[0] + 4 * (statistics.median(errors) - errors[0])
    shown = [trial for trial, error in zip(finished, errors, strict=True) if error <= limit]
    left = len(errors) - len(shown)
    word = "above" if results.measure.sign > 0 else "below"
    who = "1 trial is" if left == 1 else f"{left} trials are"
    return shown, f"{who} left out, {word} {results.shown(limit)}." if left else ""


def _cards(results: Results) -> list[tuple[Any, str]]:
    best, start = results.best, results.start
    early = sum(bool(trial.why) for trial in results.trials)
    cards: list[tuple[Any, str]] = []
    if best is not None:
        cards.append((results.shown(best.error), f"{results.measure.label} of the best, trial {best.number}"))
    if start is not None and start.error is not None:
        cards.append((results.shown(start.error), "where it began"))
    gains = results.gains()
    if gains and start is not best:
        each = ", ".join(map(results.change, gains))
        cards.append((results.change(statistics.fmean(gains)), f"the difference; on each split {each}"))
    return [*cards, (len(results.trials), f"trials, {early} of them ended early")]


def _settings(results: Results) -> list[tuple[Any, ...]]:
    """What is searched: where, where it began, the best, and what that is on all training rows."""
    found = []
    for one in results.parameters:
        span = ", ".join(map(one.shown, one.choices)) or f"{one.shown(one.low)} to {one.shown(one.high)}"
        begun, best = (t and one.shown(t.values[one.name]) for t in (results.start, results.best))
        found.append((one.flag, span, begun, best, _text(results.settings.get(one.field))))
    return found


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else (
        str(value))  # fmt: skip


def _head(results: Results) -> list[str]:
    names = [one.flag for one in results.parameters]
    return ["trial", results.measure.label, "splits apart", *names, "seconds", ""]


def _row(results: Results, trial: Trial) -> tuple[Any, ...]:
    apart = results.spread(trial).removeprefix(" +- ") or None
    values = [one.shown(trial.values[one.name]) for one in results.parameters]
    return trial.number, results.shown(trial.error), apart, *values, f"{trial.seconds:.1f}", trial.why.split(",")[0]

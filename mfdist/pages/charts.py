"""Charts as inline SVG that follows the page's colours, light and dark: every colour is a class of the page's style.

A chart is drawn ``WIDTH`` units wide, about a phone's width, so that its text stays readable on every screen; wider
pages show several beside each other. Legends are HTML below the drawing: nothing is drawn through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mfdist.pages.scales import Scale, short, short_all, span

WIDTH, HEIGHT = 370, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 40
TONES = ("a", "b", "c", "d", "e", "f")
"""Classes of colours, see ``templates/base.html``; ``muted`` is the seventh."""
ALL_BUT_EQUAL = 5e-4
"""Values within this share of each other are drawn as what they are: nearly the same."""
LETTER = 7.5
"""Width of a letter, about."""
MOST_LETTERS = 48
"""Of a text that stands alone in a line."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one colour. ``style``: line (with marks), plain (without), dashed, dots, rings."""

    label: str
    points: Sequence[Point]
    tone: str = "a"
    style: str = "line"


@dataclass(frozen=True)
class Event:
    """Something that happened at ``x``: an upright line."""

    x: float
    label: str
    tone: str = "muted"


@dataclass(frozen=True)
class Level:
    """A value to compare with: a level line."""

    y: float
    label: str
    tone: str = "muted"
    dashes: str = "6 3"


def line_chart(
    series: Sequence[Series], x: str, y: str, *, levels: Sequence[Level] = (), events: Sequence[Event] = (),
    log_x: bool = False, log_y: bool = False, whole_x: bool = False, from_zero: bool = False, diagonal: bool = False,
    names: Sequence[str] = (), years: bool = False,
) -> Markup:  # fmt: skip
    """Curves or clouds of points over two axes; '' where there is no point.

    ``diagonal``: draw y = x; ``names``: what x = 1, 2, ... are called; ``years``: x is a year with its fraction.
    """
    points = [point for one in series for point in one.points if all(map(math.isfinite, point))]
    if not points:
        return Markup("")
    xs = [px for px, _ in points] + [event.x for event in events] + ([1.0, float(len(names))] if names else [])
    ys = [py for _, py in points] + [level.y for level in levels]
    across = Scale(*span(xs, log=log_x), LEFT, WIDTH - RIGHT, log_x)
    up = Scale(*span(ys, log=log_y, from_zero=from_zero, least=ALL_BUT_EQUAL), HEIGHT - BOTTOM, TOP, log_y)
    parts = _up_axis(up, y)
    ticks = _ticks(across, whole_x or years, names, years)
    parts += _across_axis(across, x, HEIGHT, [tick for tick in ticks if tick[0] >= min(xs) or not whole_x])
    if diagonal:
        low, high = max(across.low, up.low), min(across.high, up.high)
        parts.append(_path([(across.at(v), up.at(v)) for v in (low, high)], "muted", "4 4"))
    for event in events:
        place = f"{across.at(event.x):.1f}"
        parts.append(Markup('<line class="s-{}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>').format(
            event.tone, place, place, TOP, HEIGHT - BOTTOM, event.label))  # fmt: skip
    for level in levels:
        place = f"{up.at(level.y):.1f}"
        parts.append(Markup('<line class="s-{}" stroke-dasharray="{}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}: {}'
                            "</title></line>").format(level.tone, level.dashes, LEFT, WIDTH - RIGHT, place, place,
                                                      level.label, short(level.y)))  # fmt: skip
    for one in series:
        parts += _series(one, across, up)
    return _figure(parts, _legend(series, levels, events), f"{y} by {x}")


def bar_chart(bars: Sequence[tuple[str, float]], x: str, y: str, tone: str = "a") -> Markup:
    """Upright bars with their values above where there is room; '' of none."""
    if not bars:
        return Markup("")
    up = Scale(0.0, max([value for _, value in bars] + [1e-9]) * 1.12, HEIGHT - BOTTOM, TOP)
    room = (WIDTH - LEFT - RIGHT) / len(bars)
    every = _every([label for label, _ in bars], WIDTH - LEFT - RIGHT)
    parts = [*_up_axis(up, y), _text(x, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", "name")]
    for number, (label, value) in enumerate(bars):
        middle, top = LEFT + room * (number + 0.5), up.at(value)
        parts.append(Markup('<rect class="f-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}'
                            "</title></rect>").format(tone, middle - 0.41 * room, top, 0.82 * room,
                                                      HEIGHT - BOTTOM - top, label, f"{value:,.4g}"))  # fmt: skip
        if number % every == 0:
            parts.append(_text(label, middle, HEIGHT - BOTTOM + 19, "middle"))
        if len(bars) <= 6:
            parts.append(_text(short(value), middle, top - 4, "middle"))
    return _figure(parts, Markup(""), f"{y} by {x}")


def row_chart(rows: Sequence[tuple[str, float, str]], x: str, tone: str = "a") -> Markup:
    """Level bars, a row each: (label, value, the value in words), the label above its bar; '' of none."""
    if not rows:
        return Markup("")
    height = 34 * len(rows) + BOTTOM + 6
    across = Scale(0.0, max([value for _, value, _ in rows] + [1e-9]) * 1.2, 12, WIDTH - RIGHT)
    parts = _across_axis(across, x, height, _ticks(across, False, (), False))
    for number, (label, value, words) in enumerate(rows):
        y, end = 34 * number + 20, across.at(value)
        parts.append(_text(_shortened(label), 12, y - 4, "start"))
        parts.append(Markup('<rect class="f-{}" x="12" y="{}" width="{:.1f}" height="12"><title>{}: {}</title></rect>')
                     .format(tone, y, end - 12, label, words))  # fmt: skip
        parts.append(_text(words, end + 5, y + 10, "start"))
    return _figure(parts, Markup(""), x, height)


@dataclass(frozen=True)
class Interval:
    """A value with the interval that it lies in."""

    label: str
    value: float
    low: float
    high: float
    tone: str = "a"


def interval_chart(rows: Sequence[Interval], x: str, zero: float = 0.0) -> Markup:
    """A line a row: the value as a dot on its interval, and an upright line at ``zero``; '' of none."""
    if not rows:
        return Markup("")
    height = 34 * len(rows) + BOTTOM + 6
    across = Scale(*span([zero, *(v for row in rows for v in (row.low, row.high))]), 12, WIDTH - RIGHT)
    parts = _across_axis(across, x, height, _ticks(across, False, (), False))
    place = f"{across.at(zero):.1f}"
    for number, row in enumerate(rows):
        y = 34 * number + 26
        parts.append(
            Markup('<line class="s-muted" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(place, place, y - 6, y + 8)
        )
        parts.append(_text(_shortened(row.label), 12, y - 10, "start"))
        parts.append(Markup('<line class="s-{} wide" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/><circle class="f-{}" '
                            'cx="{:.1f}" cy="{}" r="5"><title>{}</title></circle>').format(
            row.tone, across.at(row.low), across.at(row.high), y, y, row.tone, across.at(row.value), y,
            f"{row.value:+.4f} ({row.low:+.4f} to {row.high:+.4f})"))  # fmt: skip
    return _figure(parts, Markup(""), x, height)


# Parts of a drawing -------------------------------------------------------------------------------


def _figure(parts: Sequence[Markup], legend: Markup, name: str, height: int = HEIGHT) -> Markup:
    drawing = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, name, Markup("").join(parts))  # fmt: skip
    return drawing + legend


def _ticks(across: Scale, whole: bool, names: Sequence[str], years: bool) -> list[tuple[float, str]]:
    """Places of an axis and what stands there; of ``names`` as many as there is room for."""
    if names:
        every = _every(names, (across.at(2) - across.at(1)) * len(names))
        return [(k + 1, name) for k, name in enumerate(names) if k % every == 0]
    if years and across.high - across.low < 3:
        first, last = math.ceil(across.low * 12), math.floor(across.high * 12)
        months = range(first, last + 1, max(1, (last - first) // 5))
        return [(month / 12, f"{month // 12}-{month % 12 + 1:02d}") for month in months]
    values = across.ticks(7, whole)
    return list(zip(values, [f"{value:.0f}" for value in values] if years else short_all(values), strict=True))


def _every(names: Sequence[str], width: float) -> int:
    """Each how many-th of ``names``, evenly over ``width``, can be written without touching the next."""
    return max(1, math.ceil(len(names) * (max(map(len, names)) * LETTER + 8) / width))


def _up_axis(up: Scale, name: str) -> list[Markup]:
    parts, ticks = [], up.ticks()
    for value, text in zip(ticks, short_all(ticks), strict=True):
        y = up.at(value)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y, y))  # fmt: skip
        parts.append(_text(text, LEFT - 6, y + 4, "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = Markup('<text class="name" text-anchor="middle" transform="translate(11 {:.0f}) rotate(-90)">{}</text>')
    return [*parts, turned.format(middle, name)]


def _across_axis(across: Scale, name: str, height: int, ticks: Sequence[tuple[float, str]]) -> list[Markup]:
    parts = [Markup('<line class="axis" x1="{:.0f}" x2="{:.0f}" y1="{}" y2="{}"/>').format(
        across.start, across.end, height - BOTTOM, height - BOTTOM)]  # fmt: skip
    for value, text in ticks:
        place = across.at(value)
        parts.append(Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
            place, place, height - BOTTOM, height - BOTTOM + 4))  # fmt: skip
        parts.append(_text(text, min(place, WIDTH - LETTER * len(text) / 2), height - BOTTOM + 19, "middle"))
    return [*parts, _text(name, (across.start + across.end) / 2, height - 6, "middle", "name")]


def _text(text: str, x: float, y: float, anchor: str, kind: str = "tick") -> Markup:
    return Markup('<text class="{}" text-anchor="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, anchor, x, y, text)


def _shortened(text: str) -> str:
    """``text``, its middle left out where a line of the chart cannot hold it."""
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS // 2]}…{text[-MOST_LETTERS // 2 :]}"


def _series(one: Series, across: Scale, up: Scale) -> list[Markup]:
    placed = [(across.at(x), up.at(y)) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]
    parts = []
    if one.style in ("line", "plain", "dashed") and len(placed) > 1:
        parts.append(_path(placed, one.tone, "5 3" if one.style == "dashed" else ""))
    if one.style in ("line", "dots", "rings") or len(placed) == 1:
        radius = 4 if one.style == "rings" else 2 if one.style == "dots" else 3
        kind = "ring s" if one.style == "rings" else "f"
        few = len(placed) <= 200  # a title each would make a page of a million points' size
        for (x, y), (px, py) in zip(placed, one.points, strict=False):
            title = Markup("<title>{}: {}, {}</title>").format(one.label, short(px), short(py)) if few else ""
            parts.append(Markup('<circle class="{}-{}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>').format(
                kind, one.tone, x, y, radius, title))  # fmt: skip
    return parts


def _path(points: Sequence[Point], tone: str, dashes: str) -> Markup:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = Markup(' stroke-dasharray="{}"').format(dashes) if dashes else ""
    return Markup('<polyline class="line s-{}"{} points="{}"/>').format(tone, dash, line)


def _legend(series: Sequence[Series], levels: Sequence[Level], events: Sequence[Event]) -> Markup:
    entries = [(one.tone, one.style, one.label) for one in series if one.points]
    entries += [(level.tone, "dashed", f"{level.label} {short(level.y)}") for level in levels]
    entries += [(event.tone, "event", event.label.split(":")[0]) for event in events]
    if len(entries) < 2:
        return Markup("")
    once = list(dict.fromkeys(entries))
    items = Markup("").join(
        Markup('<li><i class="key {} k-{}"></i>{}</li>').format(style, tone, escape(label))
        for tone, style, label in once
    )
    return Markup('<ul class="legend">{}</ul>').format(items)

"""Axes of a chart: where a value lies, where ticks stand, and how numbers are written."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values ``low`` to ``high`` (``low < high``; above 0 where ``log``) onto pixels ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, kept within the axis."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, 1e-300)
                                                                        if self.log else value))  # fmt: skip
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6, whole: bool = False) -> list[float]:
        """At most about ``most`` round values within the axis, whole numbers where asked."""
        if self.log:
            return _powers(self.low, self.high, most)
        step = _round_step((self.high - self.low) / max(most - 1, 1), whole)
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * k, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def span(
    values: Iterable[float], *, log: bool = False, from_zero: bool = False, least: float = 0.0
) -> tuple[float, float]:
    """(low, high) of an axis that holds all ``values`` with some air; (0, 1), or (1, 10), of none.

    ``least``: how much of the largest value it spans at least, so that what is all but equal looks so.
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        return low / 1.3, max(high, 1.5 * low) * 1.3
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    air = max(air, (least * max(abs(low), abs(high)) - (high - low)) / 2)
    return (0.0 if from_zero and low >= 0 else low - air), high + air


MOST_DIGITS = 15


def short(value: float, digits: int = 4) -> str:
    """A number as an axis shows it: 1.23 M, 35 k, 0.95."""
    size = abs(value)
    for limit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= limit:
            return f"{value / limit:.{digits - 1}g}{name}"
    return f"{value:.{digits}g}"


def short_all(values: Sequence[float]) -> list[str]:
    """The ticks of an axis: as many digits, 4 or more, as tell them apart."""
    written = (list(map(functools.partial(short, digits=digits), values)) for digits in range(4, MOST_DIGITS + 1))
    return next((texts for texts in written if len({*texts}) == len({*values})), [str(value) for value in values])


def _round_step(rough: float, whole: bool) -> float:
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    return max(1.0, math.ceil(step)) if whole else step


def _powers(low: float, high: float, most: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**k for k in range(first, last + 1)]
    if len(powers) < 2:
        powers = [k * 10.0**p for p in range(first - 1, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    every = -(-len(powers) // most) or 1
    return powers[::every]

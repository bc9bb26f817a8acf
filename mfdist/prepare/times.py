"""In which unit the times of a file are: seconds to nanoseconds, days as YYYYMMDD, or years.

A number says it by its size: seconds of the years 1973 to 5138 have values of their own, and so have the same years in
each other unit. Smaller numbers say nothing, unless all are years from 1900 to 2100. The unit is that of most of a
file's first block; a later row that shows another one is refused, since a file has one unit. Everything is stored in
seconds since 1970, fractions cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from mfdist.prepare.dates import days_from_civil, is_date
from mfdist.prepare.row_checks import BAD_TIME, Block

OTHER_UNIT = "timestamp is in another unit than the file's"
_LEAST = 10**8
_SPAN = 1000
_FIRST_YEAR, _LAST_YEAR = 1900, 2100
_FIRST_DAY, _LAST_DAY = 19000101, 21001231

Times = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TimeUnit:
    """What one unit is called, and how many of them are a second (0: they are dates of a calendar)."""

    name: str
    per_second: int


SECONDS = TimeUnit("seconds", 1)
UNITS = (
    SECONDS, TimeUnit("milliseconds", 10**3), TimeUnit("microseconds", 10**6), TimeUnit("nanoseconds", 10**9)
)  # fmt: skip
DAYS = TimeUnit("days as YYYYMMDD", 0)
YEARS = TimeUnit("years", 0)
DATES = TimeUnit("dates and times", 1)
"""No number was seen."""


def unit_of(block: Block) -> TimeUnit | None:
    """The unit of a block's times; None where it has no row with one."""
    if block.time is None or block.time.size == 0:
        return None
    numbers = block.time if block.dated is None else block.time[~block.dated]
    if numbers.size == 0:
        return DATES
    if numbers.min() >= _FIRST_DAY and numbers.max() <= _LAST_DAY and _day_seconds(numbers)[1].all():
        return DAYS
    if numbers.min() >= _FIRST_YEAR and numbers.max() <= _LAST_YEAR:
        return YEARS
    told = _units_shown(numbers)
    counts = np.bincount(told[told >= 0], minlength=len(UNITS))
    return UNITS[int(counts.argmax())] if counts.any() else SECONDS


def in_seconds(block: Block, unit: TimeUnit, per_second: int = 1) -> Block:
    """The block with times in ``per_second`` parts of a second; rows whose time is in no such unit are refused."""
    if block.time is None or block.time.size == 0:
        return block
    number = np.ones(block.time.size, np.bool_) if block.dated is None else ~block.dated
    if unit in (DAYS, YEARS):
        seconds, good = _day_seconds(block.time if unit == DAYS else block.time.clip(0, 9999) * 10000 + 101)
        good |= ~number
    else:
        good, seconds = np.ones(number.size, np.bool_), block.time
        if unit.per_second > 1 or not _all_small(block.time):
            told = _units_shown(block.time)
            good = ~number | (told < 0) | (told == UNITS.index(SECONDS if unit == DATES else unit))
        if unit.per_second > 1:
            seconds = block.time // unit.per_second
    if block.dated is not None:
        seconds = np.where(block.dated, block.time, seconds)
    if per_second > 1:
        good &= np.abs(seconds) < 2**63 // per_second
        seconds = seconds * per_second
    if seconds is not block.time:
        block.time = seconds
    return block if good.all() else block.refuse(~good, BAD_TIME if unit == DAYS else OTHER_UNIT)


def _all_small(time: Times) -> bool:
    """Whether every number is a second of the years up to 5138, or small enough to be anything."""
    most = _LEAST * _SPAN
    return bool(time.max() < most and time.min() > -most)


def _units_shown(time: Times) -> npt.NDArray[np.int8]:
    """Place in UNITS that each number's size shows; -1 where it shows none."""
    size = np.abs(time.astype(np.float64))
    edges = [_LEAST * float(_SPAN) ** k for k in range(len(UNITS))]
    return (np.searchsorted(edges, size, side="right") - 1).astype(np.int8)


@numba.njit(nogil=True, cache=True)
def _day_seconds_of(time: Any, seconds: Any, good: Any) -> None:
    for i in range(time.size):
        year, month, day = time[i] // 10000, time[i] // 100 % 100, time[i] % 100
        good[i] = 1900 <= year <= 2100 and is_date(year, month, day)
        seconds[i] = days_from_civil(year, month, day) * 86400 if good[i] else 0


def _day_seconds(time: Times) -> tuple[Times, npt.NDArray[np.bool_]]:
    """Seconds since 1970 of days as YYYYMMDD, and which are days."""
    seconds, good = np.empty(time.size, np.int64), np.empty(time.size, np.bool_)
    _day_seconds_of(time, seconds, good)
    return seconds, good

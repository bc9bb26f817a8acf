"""Dates and times as text to seconds since 1970, UTC; a text without a zone is taken as UTC.

ISO 8601 (``2018-07-01``, ``2018-07-01T12:30:05.25+02:00``, a blank in the place of the T) is read by compiled code; the
date of Unix (``Fri Sep 08 10:44:24 -0700 2017``) in Python. Fractions of a second are cut off.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import numba
import numpy as np

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNIX = re.compile(
    rf"[A-Z][a-z]{{2}} ({'|'.join(_MONTHS)}) ( ?\d|\d\d) (\d\d):(\d\d):(\d\d) "
    r"(?:([+-])(\d\d)(\d\d) |UTC |GMT )?(\d{4})"
)
_DASH, _COLON, _PLUS, _POINT, _BLANK, _T, _Z = 45, 58, 43, 46, 32, 84, 90


@numba.njit(nogil=True, cache=True)
def days_from_civil(year: Any, month: Any, day: Any) -> Any:
    """Days since 1970-01-01 of a date of the Gregorian calendar (Hinnant's days_from_civil)."""
    y = year - (1 if month <= 2 else 0)
    era = y // 400
    of_era = y - era * 400
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return era * 146097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719468


@numba.njit(nogil=True, cache=True)
def is_date(year: Any, month: Any, day: Any) -> Any:
    """Whether there is such a day."""
    if year < 1 or month < 1 or month > 12 or day < 1 or day > 31:
        return False
    if month == 2:
        return day <= (29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28)
    return day <= (30 if month in (4, 6, 9, 11) else 31)


@numba.njit(nogil=True, cache=True)
def _digits(content: Any, at: Any, n: Any) -> Any:
    """The number of ``n`` digits at ``at``; -1 where one is none."""
    value = np.int64(0)
    for k in range(at, at + n):
        if content[k] < 48 or content[k] > 57:
            return np.int64(-1)
        value = value * 10 + np.int64(content[k] - 48)
    return value


@numba.njit(nogil=True, cache=True)
def _zone(content: Any, p: Any, end: Any) -> Any:
    """(seconds east of UTC, valid) of what stands behind a time: nothing, Z, +hh, +hhmm, +hh:mm."""
    if p < end and content[p] == _BLANK:
        p += 1
    if p == end:
        return np.int64(0), True
    sign = content[p]
    p += 1
    if sign == _Z:
        return np.int64(0), p == end
    if sign not in (_PLUS, _DASH) or end - p < 2:
        return np.int64(0), False
    hours = _digits(content, p, 2)
    p += 2
    minutes = np.int64(0)
    if p < end:
        p += 1 if content[p] == _COLON else 0
        if end - p != 2:
            return np.int64(0), False
        minutes = _digits(content, p, 2)
    if hours < 0 or hours > 23 or minutes < 0 or minutes > 59:
        return np.int64(0), False
    east = hours * 3600 + minutes * 60
    return (east if sign == _PLUS else -east), True


@numba.njit(nogil=True, cache=True)
def _clock(content: Any, p: Any, end: Any) -> Any:
    """(seconds since midnight, place behind them; -1: none) of hh:mm[:ss[.fraction]]."""
    if end - p < 5 or content[p + 2] != _COLON:
        return np.int64(0), -1
    hour, minute, second = _digits(content, p, 2), _digits(content, p + 3, 2), np.int64(0)
    p += 5
    if p < end and content[p] == _COLON:
        if end - p < 3:
            return np.int64(0), -1
        second = _digits(content, p + 1, 2)
        p += 3
        if p < end and content[p] == _POINT:
            p += 1
            if p == end or content[p] < 48 or content[p] > 57:
                return np.int64(0), -1
            while p < end and 48 <= content[p] <= 57:
                p += 1
    if hour < 0 or hour > 23 or minute < 0 or minute > 59 or second < 0 or second > 60:
        return np.int64(0), -1
    return hour * 3600 + minute * 60 + second, p


@numba.njit(nogil=True, cache=True)
def iso_seconds(content: Any, start: Any, length: Any) -> Any:
    """(seconds since 1970, True) of the ISO 8601 text in a span, (0, False) where it is none."""
    p, end = start, start + length
    while p < end and content[p] == _BLANK:
        p += 1
    while end > p and content[end - 1] == _BLANK:
        end -= 1
    if end - p < 10 or content[p + 4] != _DASH or content[p + 7] != _DASH:
        return np.int64(0), False
    year, month, day = _digits(content, p, 4), _digits(content, p + 5, 2), _digits(content, p + 8, 2)
    if not is_date(year, month, day):
        return np.int64(0), False
    seconds = np.int64(days_from_civil(year, month, day) * 86400)
    p += 10
    if p == end:
        return seconds, True
    if content[p] != _T and content[p] != _BLANK:
        return np.int64(0), False
    of_day, p = _clock(content, p + 1, end)
    if p < 0:
        return np.int64(0), False
    east, valid = _zone(content, p, end)
    return (seconds + of_day - east, True) if valid else (np.int64(0), False)


def text_seconds(text: str) -> int | None:
    """Seconds since 1970 of a date or time as text; None where it is none."""
    content = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    seconds, valid = iso_seconds(content, 0, content.size)
    return int(seconds) if valid else _unix_seconds(text)


def _unix_seconds(text: str) -> int | None:
    match = _UNIX.fullmatch(text.strip())
    if match is None:
        return None
    month, day, hour, minute, second, sign, hours, minutes, year = match.groups()
    try:
        local = datetime(int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second))
    except ValueError:
        return None
    east = (int(hours) * 3600 + int(minutes) * 60) * (-1 if sign == "-" else 1) if sign else 0
    return int((local - datetime(1970, 1, 1)).total_seconds()) - east

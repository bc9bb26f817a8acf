"""What the columns of a file without names can be: whether taking the third one as the rating makes sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EARLIEST_TIME = 1e8
"""Whole numbers from here on are taken for times: seconds since 1970 reach it in March 1973."""
MAX_RATING_VALUES = 21
"""Different whole numbers that a rating column has at most: 0 to 10 by halves. More are doubted, and only beside a
column that fits better."""
MIN_ROWS = 20
"""Rows that a sample has at least before much is said of how its values repeat."""
MIN_ROWS_OF_DISTINCT = 100
"""Rows that a sample has at least before ratings that are all different are doubted."""
ORDINALS = ("first", "second", "third", "fourth")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Facts:
    """What the values of a column in the sample have in common."""

    rows: int
    numbers: float  # share of the values that are numbers; what follows is of those
    whole: bool = False
    distinct: int = 0
    median: float = 0.0
    counts: bool = False  # 0, 1, 2, ... or 1, 2, 3, ...: the number of the row
    grouped: bool = False  # equal values stand together in MIN_ROWS or more: the file is sorted by this column
    example: str = ""

    @property
    def like_times(self) -> bool:
        return self.numbers > 0.9 and self.whole and self.median >= EARLIEST_TIME

    @property
    def like_ratings(self) -> bool:
        small = self.distinct <= MAX_RATING_VALUES and abs(self.median) < 1000
        return self.numbers > 0.9 and small and not self.counts and not (self.grouped and self.distinct > 1)


def facts_of(values: Sequence[str]) -> Facts:
    """The facts of a column; no value is missing."""
    numbers = np.array([float(value) for value in values if is_number(value)])
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return Facts(len(values), 0.0, example=values[0].strip() if values else "")
    distinct = int(np.unique(numbers).size)
    runs = 1 + int(np.count_nonzero(np.diff(numbers)))
    counts = numbers.size > 2 and numbers[0] in (0, 1) and bool(np.all(np.diff(numbers) == 1))
    example = next((value.strip() for value in values if not is_number(value)), values[0].strip())
    return Facts(len(values), numbers.size / len(values), bool(np.all(numbers == np.floor(numbers))), distinct,
                 float(np.median(numbers)), counts, numbers.size >= MIN_ROWS and runs == distinct, example)  # fmt: skip


def doubt(rows: Sequence[Sequence[str]], places: Sequence[int]) -> str:
    """Why the rows cannot be read as user, item, rating[, time] at ``places``; '' where nothing speaks against it."""
    facts = [facts_of(column) for column in zip(*rows, strict=True)]
    rating, time = facts[places[2]], facts[places[3]] if places[3] >= 0 else None
    reasons = {
        f"holds no numbers, such as {rating.example!r}": rating.numbers < 0.5,
        f"has values like times, such as {rating.example}": rating.like_times,
        f"has another value in each of {rating.rows:,} rows, such as {rating.example}":
            rating.whole and rating.rows >= MIN_ROWS_OF_DISTINCT and rating.distinct == rating.rows,
        f"has {rating.distinct} different values, and another column fits better":
            rating.whole and rating.distinct > MAX_RATING_VALUES
            and any(f.like_ratings for k, f in enumerate(facts) if k != places[2]),
    }  # fmt: skip
    found = next((reason for reason, holds in reasons.items() if holds), "")
    if found:
        return f"the {ORDINALS[places[2]]} column, read as the rating, {found}"
    if time is None or time.like_times or time.numbers <= 0.9:
        return ""
    if any(facts[k].like_times for k in places[:2]):
        return f"the {ORDINALS[places[3]]} column, read as the time, has no values like times, and another column has"
    if facts[places[0]].counts and (time.like_ratings or time.rows >= MIN_ROWS):
        return "the first column counts the rows"
    if time.rows >= MIN_ROWS and time.like_ratings and time.distinct > 1:
        return (
            f"the {ORDINALS[places[3]]} column, read as the time, has {time.distinct} different values, as ratings have"
        )
    return ""


def guess(rows: Sequence[Sequence[str]], first: int = 0) -> str:
    """A value of ``--columns`` that fits the rows better, positions counted from ``first``; '' where there is none."""
    facts = [facts_of(column) for column in zip(*rows, strict=True)]
    times = [k for k, f in enumerate(facts) if f.like_times]
    ratings = [k for k, f in enumerate(facts) if f.like_ratings and k not in times]
    taken = [*ratings[-1:], *times[-1:]]
    free = [k for k, f in enumerate(facts) if k not in taken and not f.counts]
    free += [k for k, f in enumerate(facts) if k not in taken and f.counts]
    if not ratings or len(free) < 2:
        return ""
    return ",".join(str(k + first) for k in [*sorted(free[:2]), *taken])

"""How many ratings each user or item has: a degree distribution for any number of ids and rows.

A curve is the fraction of ids with at least d ratings, given at a few degrees and straight between them on
log-log axes. Ids of equal degree form a class, so that hundreds of classes describe millions of ids:

    4 ids, 7 rows  ->  degrees (3, 2, 1), counts (1, 1, 2):  id 0 has 3 ratings, id 1 has 2, ids 2 and 3 have 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DegreeCurve:
    """``knots``: (degree, ids with at least that many ratings of ``num_ids``), the first degree being 1.

    ``top`` are the exact degrees of the first ids at ``num_ids`` ids and ``num_rows`` rows; the last knot is
    (``top[-1]``, ``len(top)``). At other sizes degrees above ``keep`` are stretched so that they sum to the rows.
    """

    num_ids: int
    num_rows: int
    knots: tuple[tuple[float, float], ...]
    top: tuple[int, ...] = ()
    keep: int = 1

    def fraction(self, degrees: FloatArray) -> FloatArray:
        """The fraction of ids with at least ``degrees`` ratings; 0 above the last knot."""
        at, ids = np.array(self.knots).T
        values = np.exp(np.interp(np.log(degrees), np.log(at), np.log(ids / ids[0])))
        return np.where(degrees > at[-1], 0.0, values)

    def num_ids_for(self, num_rows: int) -> int:
        """The number of ids that keeps the mean degree at ``num_rows`` rows."""
        return max(1, round(self.num_ids * num_rows / self.num_rows))


@dataclass(frozen=True)
class DegreeClasses:
    """``counts[c]`` ids have ``degrees[c]`` ratings each; int64, degrees falling, ids numbered in that order."""

    degrees: Int64Array
    counts: Int64Array

    @property
    def first_id(self) -> Int64Array:
        """(classes + 1,): the first id of each class, and the number of ids."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def first_row(self) -> Int64Array:
        """(classes + 1,): the rows before each class when rows are laid out id by id, and the number of rows."""
        return np.concatenate([[0], np.cumsum(self.counts * self.degrees)])


def degree_classes(curve: DegreeCurve, num_ids: int, num_rows: int) -> DegreeClasses:
    """``curve`` for ``num_ids`` ids that have ``num_rows`` ratings in all, each at least one: both sums are exact."""
    if not 1 <= num_ids <= num_rows:
        raise ValueError(f"{num_ids} ids cannot have {num_rows} ratings with at least one each")
    if curve.top and (num_ids, num_rows) == (curve.num_ids, curve.num_rows):
        counts = _counts(curve, num_ids, 1.0, curve.keep, curve.top[0])
        counts[curve.top[-1]] -= len(curve.top)
        counts = np.concatenate([counts, np.zeros(curve.top[0], np.int64)])
        np.add.at(counts, np.array(curve.top), 1)
        keep = curve.keep
    else:
        counts, keep = _stretched(curve, num_ids, num_rows)
    counts = _move_to_sum(counts, num_rows, keep)
    degrees = np.flatnonzero(counts)[::-1]
    return DegreeClasses(degrees, counts[degrees])


def _counts(curve: DegreeCurve, num_ids: int, stretch: float, keep: int, highest: int) -> Int64Array:
    """ids by degree (index): the curve with every degree d above ``keep`` moved to keep + (d - keep) * stretch.

    What would be above ``highest`` is at ``highest``.
    """
    last = min(math.ceil(keep + (curve.knots[-1][0] - keep) * stretch) + 1, highest)
    degrees = np.arange(1, last + 2, dtype=np.float64)
    source = np.where(degrees <= keep, degrees, keep + (degrees - keep) / stretch)
    at_least = np.rint(curve.fraction(source) * num_ids).astype(np.int64)
    at_least[-1] = 0
    return np.concatenate([[0], at_least[:-1] - at_least[1:]])


def _stretched(curve: DegreeCurve, num_ids: int, num_rows: int) -> tuple[Int64Array, int]:
    """Counts by degree whose sum is close to ``num_rows``, and the highest degree that was left alone."""
    likely = max((num_rows / num_ids - 1) / (curve.num_rows / curve.num_ids - 1), 1e-3)
    for keep, middle, span in ((curve.keep, 1.0, 5.0), (1, likely, 1e3)):
        low, high = middle / span, middle * span
        for _ in range(40):
            stretch = math.sqrt(low * high)
            counts = _counts(curve, num_ids, stretch, keep, num_rows)
            total = int(counts @ np.arange(len(counts)))
            low, high = (stretch, high) if total < num_rows else (low, stretch)
        if abs(total - num_rows) <= max(0.01 * num_rows, 50):
            break
    return counts, keep


def _move_to_sum(counts: Int64Array, num_rows: int, keep: int) -> Int64Array:
    """Move ids by one degree until the degrees sum to ``num_rows``, those just above ``keep`` first."""
    counts = counts.copy()
    missing = num_rows - int(counts @ np.arange(len(counts)))
    while missing:
        step = 1 if missing > 0 else -1
        lowest = keep + 1 if step > 0 else keep + 2
        if not counts[lowest:].any():
            lowest = 1 if step > 0 else 2
        counts = np.concatenate([counts, [0]])
        for degree in range(lowest, len(counts) - 1):
            moved = min(int(counts[degree]), abs(missing))
            counts[degree] -= moved
            counts[degree + step] += moved
            missing -= step * moved
    return counts

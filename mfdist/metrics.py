"""How wrong predictions are: sums in float64 that add over chunks, lanes and ranks, and become figures only at the end.

RMSE is the root of (sum of squared errors / number of rows) over the whole split, never a mean of batch values.
Every row is in exactly one of the slices of :data:`SLICES`; ``all`` is their sum.

>>> sums = SliceSums(low=1, high=5, step=1)
>>> sums.add(np.array([4.6, 0.2]), np.array([5.0, 2.0]), np.array([False, True]), np.array([False, False]))
>>> sums.summary()["slices"]["all"]["rows"], round(sums.summary()["headline"]["val_mae_clipped"], 6)
(2, 0.7)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

SLICES = ("warm", "cold_user", "cold_item", "cold_both")
COLUMNS = ("rows", "sse", "sae", "sse_rounded", "sae_rounded", "sse_clipped", "sae_clipped")


def round_to_scale(prediction: npt.ArrayLike, low: float, high: float, step: float) -> FloatArray:
    """The rating nearest to each prediction: low, low + step, ... high; halves go up, NaN stays NaN.

    On 1 to 5 with step 1 this is the vignette's step function to whole stars (below 1.5 is 1, from 4.5 is 5).
    """
    values = np.asarray(prediction, np.float64)
    return np.clip(low + step * np.floor((values - low) / step + 0.5), low, high)


def clip_to_scale(prediction: npt.ArrayLike, low: float, high: float) -> FloatArray:
    """Predictions moved to the nearest end of the scale where they lie outside; NaN stays NaN."""
    return np.clip(np.asarray(prediction, np.float64), low, high)


def rmse(sse: float, rows: float) -> float | None:
    """Root of the mean squared error; None of no rows."""
    return math.sqrt(sse / rows) if rows else None


def mae(sae: float, rows: float) -> float | None:
    """Mean absolute error; None of no rows."""
    return float(sae / rows) if rows else None


class SliceSums:
    """Error sums of each slice for raw, rounded and clipped predictions.

    ``values`` is float64 of shape (len(SLICES), len(COLUMNS)). Add it over ranks (``world.sum(sums.values)``) and put
    it back with :meth:`from_values`; the order of additions is the only thing that a world size changes.
    """

    def __init__(self, low: float, high: float, step: float) -> None:
        self.low, self.high, self.step = float(low), float(high), float(step)
        self.values: FloatArray = np.zeros((len(SLICES), len(COLUMNS)))

    @staticmethod
    def from_values(values: FloatArray, low: float, high: float, step: float) -> SliceSums:
        """The sums whose ``values`` were added elsewhere."""
        sums = SliceSums(low, high, step)
        assert values.shape == sums.values.shape
        sums.values = np.array(values, np.float64)
        return sums

    def add(self, prediction: Array, rating: Array, user_cold: Array, item_cold: Array) -> None:
        """Add rows, all arrays of shape (rows,). ``user_cold``/``item_cold``: training never saw that user/item."""
        raw = np.asarray(prediction, np.float64)
        truth = np.asarray(rating, np.float64)
        which = np.asarray(user_cold, np.int64) + 2 * np.asarray(item_cold, np.int64)
        variants = (raw, round_to_scale(raw, self.low, self.high, self.step), clip_to_scale(raw, self.low, self.high))
        columns: list[Array] = [np.bincount(which, minlength=len(SLICES)).astype(np.float64)]
        for variant in variants:
            error = variant - truth
            columns.append(np.bincount(which, error * error, len(SLICES)))
            columns.append(np.bincount(which, np.abs(error), len(SLICES)))
        self.values += np.stack(columns, axis=1)

    def summary(self) -> dict[str, Any]:
        """``{"slices": {all, warm, ...: {rows, rmse, mae}}, "headline": {val_rmse, val_mae, val_rmse_rounded,
        val_mae_rounded, val_rmse_clipped, val_mae_clipped}}``; a figure over no rows is None.
        """
        total = self.values.sum(axis=0)
        slices = {"all": _figures(total)} | {name: _figures(row) for name, row in zip(SLICES, self.values, strict=True)}
        headline = {}
        for column, suffix in ((1, ""), (3, "_rounded"), (5, "_clipped")):
            headline[f"val_rmse{suffix}"] = rmse(total[column], total[0])
            headline[f"val_mae{suffix}"] = mae(total[column + 1], total[0])
        return {"slices": slices, "headline": headline}


def _figures(sums: FloatArray) -> dict[str, Any]:
    return {"rows": int(sums[0]), "rmse": rmse(sums[1], sums[0]), "mae": mae(sums[2], sums[0])}


# Comparing two predictors -------------------------------------------------------------------------

BLOCKS = 4096
REPLICATES = 2000


def hash_rows(first: Array, second: Array | int, seed: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash (splitmix64, Steele, Lea, Flood 2014) of two whole numbers and a seed, elementwise."""
    key = np.array([seed % 2**64], np.uint64)
    for value in (first, second):
        key = _mix((key + np.uint64(0x9E3779B97F4A7C15)) ^ np.asarray(value).astype(np.uint64))
    return key


def in_sample(user: Array, sample: float) -> npt.NDArray[np.bool_]:
    """Which users (dataset rows) a sample holds: by a hash of the row alone, so the same for every run and seed."""
    if sample >= 1.0:
        return np.ones(len(user), np.bool_)
    mixed = (user.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    chosen: npt.NDArray[np.bool_] = (mixed >> np.uint64(11)) < np.uint64(int(sample * (1 << 53)))
    return chosen


def block_of(user: Array, item: Array, seed: int) -> npt.NDArray[np.int64]:
    """The bootstrap block, 0 to BLOCKS - 1, of each row: by a hash of its pair, so the same for any lanes or ranks."""
    return (hash_rows(user, item, seed) >> np.uint64(52)).astype(np.int64)


def bootstrap_interval(
    rows: Array, sse: Array, other_sse: Array, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """(RMSE difference, low, high): the paired percentile bootstrap interval of RMSE(sse) - RMSE(other_sse).

    Arguments are sums of each of BLOCKS blocks, float64 (BLOCKS,). Blocks are resampled with replacement,
    both predictors by the same draw. A block holds rows chosen by hash, so that its sums vary as those of as many
    rows at random, and the memory is that of the blocks, whatever the number of rows.
    """
    used = np.flatnonzero(rows)
    if not len(used):
        return math.nan, math.nan, math.nan
    sums = np.stack([rows[used], sse[used], other_sse[used]], axis=1)
    rng = np.random.default_rng([seed, 0xB007])
    share = np.full(len(used), 1.0 / len(used))
    differences = np.concatenate([
        _difference(rng.multinomial(len(used), share, size=100) @ sums) for _ in range(REPLICATES // 100)
    ])  # fmt: skip
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(_difference(sums.sum(axis=0))), float(low), float(high)


def _difference(sums: FloatArray) -> FloatArray:
    """RMSE difference of (..., 3) sums: rows, squared errors of the one and of the other."""
    total = np.sqrt(sums[..., 1] / sums[..., 0]) - np.sqrt(sums[..., 2] / sums[..., 0])
    return np.asarray(total, np.float64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed

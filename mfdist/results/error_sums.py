"""Where and how a model errs on the rows of a split: sums that add over chunks, lanes and ranks, and their figures.

Slices (raw predictions, ``metrics.SliceSums``) and, of predictions clipped to the scale: errors by the training ratings
of the row's user and item, calibration, rating against prediction, residuals, and the blocks of the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist import metrics
from mfdist.data.dataset import Manifest
from mfdist.metrics import SliceSums

ACTIVITY_CAP = 4096
"""Training counts from here on share a bin when deciles are made."""
CALIBRATION_BINS = 20
MOST_LEVELS = 11
"""Ratings on a finer scale are told apart by so many levels."""
RESIDUAL_BINS = 40

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class ErrorSums:
    """Sums of one model's errors; all arrays float64.

    ``activity`` (2, ACTIVITY_CAP + 1, 3): [user, item][training count][rows, sse, sae]; ``calibration``
    (CALIBRATION_BINS, 3): [bin of predictions][rows, prediction, rating]; ``levels`` (levels, levels): rows by rating
    and rounded prediction; ``residuals`` (RESIDUAL_BINS,): rows by prediction minus rating; ``blocks`` (BLOCKS, 2):
    [block of the bootstrap][rows, sse].
    """

    def __init__(self, manifest: Manifest, seed: int = 0) -> None:
        self.low, self.high = manifest.rating_scale
        self.step, self.seed = manifest.rating_step, seed
        self.slices = SliceSums(self.low, self.high, self.step)
        levels = min(MOST_LEVELS, round((self.high - self.low) / self.step) + 1 if self.step > 0 else 1)
        self.activity = np.zeros((2, ACTIVITY_CAP + 1, 3))
        self.calibration = np.zeros((CALIBRATION_BINS, 3))
        self.levels = np.zeros((max(levels, 2), max(levels, 2)))
        self.residuals = np.zeros(RESIDUAL_BINS)
        self.blocks = np.zeros((metrics.BLOCKS, 2))

    def add(self, prediction: Array, rating: Array, user: Array, item: Array, counts: tuple[Array, Array]) -> None:
        """Add rows, all arrays (rows,): ``counts`` are the training ratings of each row's user and item."""
        self.slices.add(prediction, rating, counts[0] == 0, counts[1] == 0)
        clipped, truth = metrics.clip_to_scale(prediction, self.low, self.high), rating.astype(np.float64)
        error, width = clipped - truth, max(self.high - self.low, 1e-12)
        for side, count in enumerate(counts):
            bins = np.minimum(count, ACTIVITY_CAP)
            self.activity[side] += _binned(bins, ACTIVITY_CAP + 1, error * error, np.abs(error))
        share = np.nan_to_num((clipped - self.low) / width)
        place = np.clip(share * CALIBRATION_BINS, 0, CALIBRATION_BINS - 1).astype(np.int64)
        self.calibration += _binned(place, CALIBRATION_BINS, clipped, truth)
        levels = len(self.levels)
        given, shown = (
            np.clip(np.floor(part * (levels - 1) + 0.5), 0, levels - 1).astype(np.int64)
            for part in ((truth - self.low) / width, share)
        )
        self.levels += np.bincount(given * levels + shown, minlength=levels * levels).reshape(levels, levels)
        residual = np.nan_to_num((error / width + 1) / 2 * RESIDUAL_BINS)
        self.residuals += np.bincount(np.clip(residual, 0, RESIDUAL_BINS - 1).astype(np.int64), minlength=RESIDUAL_BINS)
        self.blocks += _binned(metrics.block_of(user, item, self.seed), metrics.BLOCKS, error * error)

    def add_ranks(self, summed: Callable[[Floats], Floats]) -> None:
        """Replace every sum by that over all ranks; collective (``summed`` is ``world.sum``)."""
        self.slices = SliceSums.from_values(summed(self.slices.values), self.low, self.high, self.step)
        for name in ("activity", "calibration", "levels", "residuals", "blocks"):
            setattr(self, name, summed(getattr(self, name)))

    def figures(self) -> dict[str, Any]:
        """Headline and slices (``SliceSums.summary``), ``rmse_interval`` (95%, of the clipped RMSE), ``user_activity``,
        ``item_activity``, ``calibration``, ``calibration_error``, ``levels`` and ``residuals``.
        """
        summary = self.slices.summary()
        bins, error = _calibration(self.calibration)
        _, low, high = metrics.bootstrap_interval(
            self.blocks[:, 0], self.blocks[:, 1], np.zeros(metrics.BLOCKS), self.seed
        )
        width = self.high - self.low
        return {
            **summary["headline"],
            "rmse_interval": [low, high] if np.isfinite(low) else None,
            "slices": summary["slices"],
            "user_activity": deciles(self.activity[0]),
            "item_activity": deciles(self.activity[1]),
            "calibration": bins,
            "calibration_error": error,
            "levels": {"ratings": np.linspace(self.low, self.high, len(self.levels)).tolist(),
                       "rows": self.levels.astype(np.int64).tolist()},
            "residuals": {"from": -width, "to": width, "rows": self.residuals.astype(np.int64).tolist()},
        }  # fmt: skip


def headline_of(figures: dict[str, Any]) -> dict[str, Any]:
    """The part of ``figures`` that a report's ``final`` holds (``SliceSums.summary()["headline"]``)."""
    return {key: value for key, value in figures.items() if key.startswith(("val_rmse", "val_mae"))}


def deciles(activity: Floats) -> list[dict[str, Any]]:
    """Ten equal parts of the rows by training count of their user (or item): fewer where many rows share a count.

    ``activity``: (counts, 3) sums of rows, squared and absolute errors. A count is never split between two parts.
    """
    rows = activity[:, 0]
    middle = np.cumsum(rows) - rows / 2
    part = np.minimum((10 * middle / max(rows.sum(), 1.0)).astype(np.int64), 9)
    found = []
    for number in range(10):
        counts = np.flatnonzero((part == number) & (rows > 0))
        if len(counts):
            total = activity[counts].sum(axis=0)
            found.append({
                "ratings_from": int(counts[0]), "ratings_to": int(counts[-1]), "rows": int(total[0]),
                "rmse": metrics.rmse(total[1], total[0]), "mae": metrics.mae(total[2], total[0]),
            })  # fmt: skip
    return found


def _binned(bins: Array, size: int, *values: Floats) -> Floats:
    """(size, 1 + len(values)): rows of each bin and the sums of each value."""
    rows = np.bincount(bins, minlength=size).astype(np.float64)
    return np.stack([rows, *(np.bincount(bins, value, size) for value in values)], axis=1)


def _calibration(sums: Floats) -> tuple[list[dict[str, Any]], float | None]:
    """Mean prediction and mean rating of each bin of predictions, and the mean distance of the two over rows."""
    bins = [
        {"rows": int(rows), "predicted": prediction / rows, "actual": rating / rows}
        for rows, prediction, rating in sums.tolist()
        if rows
    ]
    rows = sums[:, 0].sum()
    return bins, float(np.abs(sums[:, 1] - sums[:, 2]).sum() / rows) if rows else None

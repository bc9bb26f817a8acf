"""The vignette's published numbers, and whether a reproduction meets them.

A number is met within its printed precision or 0.0025, whichever is wider, and a training curve within 0.2. On the
synthetic twin of the file only what the twin claims is judged, with the twin's own tolerance; the rest is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Reports = dict[str, dict[str, Any]]
"""report.json of each run by name (mf, mf_advanced, svd, ...), and dataset.json as "data"."""

ROWS, USERS, ITEMS = 7_824_482, 4_201_696, 476_002
HISTOGRAM = (901_765, 456_322, 633_073, 1_485_781, 4_347_541)
TOP_USERS = (520, 501, 498, 431, 406, 380, 314, 311, 308, 296)
USERS_OF_50 = 1_540
CURVES = {
    "mf": {"train_rmse": {0: 6.8, 9: 1.7}, "val_rmse": {0: 6.5, 9: 5.5}},
    "mf_advanced": {
        "train_rmse": {0: 1.5, 9: 0.7},
        "val_rmse": {0: 1.4, **dict.fromkeys(range(1, 6), 1.3), 9: 1.4},
    },
}
"""Printed RMSE of the epochs that the vignette names."""
EPOCHS = 10
ONE_DECIMAL, FOUR_DECIMALS, CURVE = 0.05, 0.0025, 0.2


@dataclass(frozen=True)
class Number:
    """``tolerance`` is of the real file; ``twin`` of the synthetic one, None where the twin does not claim it."""

    of: str
    what: str
    published: float
    tolerance: float
    twin: float | None
    find: Callable[[Reports], float | None]


@dataclass(frozen=True)
class Check:
    """One line of the table. ``verdict``: pass, FAIL, or not claimed."""

    of: str
    what: str
    published: float
    ours: float | None
    tolerance: float | None
    verdict: str


def check(reports: Reports, synthetic: bool, judged: bool = True) -> list[Check]:
    """All numbers; nothing passes or fails where not ``judged`` (another size, fewer epochs)."""
    return [_check(number, number.find(reports), synthetic, judged) for number in NUMBERS]


def _check(number: Number, ours: float | None, synthetic: bool, judged: bool) -> Check:
    tolerance = (number.twin if synthetic else number.tolerance) if judged else None
    if tolerance is None:
        verdict = "not claimed"
    else:
        met = ours is not None and abs(ours - number.published) <= tolerance + 1e-9
        verdict = "pass" if met else "FAIL"
    return Check(number.of, number.what, number.published, ours, tolerance, verdict)


# Where each number is found -----------------------------------------------------------------------


def _at(run: str, key: str, epoch: int) -> Callable[[Reports], float | None]:
    def find(reports: Reports) -> float | None:
        epochs = reports[run]["epochs"]
        return epochs[epoch][key] if epoch < len(epochs) else None

    return find


def _val_curve(reports: Reports) -> list[float]:
    return [epoch["val_rmse"] for epoch in reports["mf_advanced"]["epochs"]]


def _furthest_of_the_middle(reports: Reports) -> float | None:
    """Of epochs 1 to 5, the validation RMSE that is furthest from the 1.3 printed for all of them."""
    middle = _val_curve(reports)[1:6]
    return max(middle, key=lambda value: abs(value - 1.3)) if len(middle) == 5 else None


def _rise(reports: Reports) -> float | None:
    curve = _val_curve(reports)
    return curve[-1] - min(curve)


def _histogram(reports: Reports) -> list[tuple[float, int]]:
    return [(float(value), int(count)) for value, count in reports["data"]["rating_histogram"]]


def _rmse_of_mean(reports: Reports) -> float:
    rows = sum(count for _, count in _histogram(reports))
    mean = sum(value * count for value, count in _histogram(reports)) / rows
    return float((sum(count * (value - mean) ** 2 for value, count in _histogram(reports)) / rows) ** 0.5)


def _mae_of(prediction: float | None) -> Callable[[Reports], float]:
    def find(reports: Reports) -> float:
        histogram = _histogram(reports)
        rows = sum(count for _, count in histogram)
        value = sum(v * count for v, count in histogram) / rows if prediction is None else prediction
        return sum(count * abs(v - value) for v, count in histogram) / rows

    return find


NUMBERS = (
    Number("file", "ratings", ROWS, 0, 0, lambda r: sum(count for _, count in _histogram(r))),
    Number("file", "users", USERS, 0, 0, lambda r: r["data"]["num_users"]),
    Number("file", "items", ITEMS, 0, 0, lambda r: r["data"]["num_items"]),
    Number("file", "RMSE of the mean, all rows", 1.3809, FOUR_DECIMALS, FOUR_DECIMALS, _rmse_of_mean),
    Number("file", "MAE of the mean, all rows", 1.0976, FOUR_DECIMALS, FOUR_DECIMALS, _mae_of(None)),
    Number("file", "MAE of predicting 5, all rows", 0.9877, FOUR_DECIMALS, FOUR_DECIMALS, _mae_of(5.0)),
    Number("svd", "validation RMSE", 1.2943, FOUR_DECIMALS, 0.01, lambda r: r["svd"]["final"]["val_rmse_clipped"]),
    Number("svd", "validation MAE", 1.0190, FOUR_DECIMALS, 0.015, lambda r: r["svd"]["final"]["val_mae_clipped"]),
    Number("mf", "training RMSE, epoch 0", 6.8, CURVE, CURVE, _at("mf", "train_rmse", 0)),
    Number("mf", "training RMSE, epoch 9", 1.7, CURVE, CURVE, _at("mf", "train_rmse", 9)),
    Number("mf", "validation RMSE, epoch 0", 6.5, ONE_DECIMAL, None, _at("mf", "val_rmse", 0)),
    Number("mf", "validation RMSE, epoch 9", 5.5, ONE_DECIMAL, 0.5, _at("mf", "val_rmse", 9)),
    Number("mf_advanced", "training RMSE, epoch 0", 1.5, CURVE, None, _at("mf_advanced", "train_rmse", 0)),
    Number("mf_advanced", "training RMSE, epoch 9", 0.7, CURVE, None, _at("mf_advanced", "train_rmse", 9)),
    Number("mf_advanced", "validation RMSE, epoch 0", 1.4, ONE_DECIMAL, None, _at("mf_advanced", "val_rmse", 0)),
    Number("mf_advanced", "validation RMSE, best", 1.3, ONE_DECIMAL, ONE_DECIMAL, lambda r: min(_val_curve(r))),
    Number("mf_advanced", "the same, worst of epochs 1-5", 1.3, ONE_DECIMAL, None, _furthest_of_the_middle),
    Number("mf_advanced", "validation RMSE, epoch 9", 1.4, ONE_DECIMAL, None, _at("mf_advanced", "val_rmse", 9)),
    Number("mf_advanced", "rise from the best to the last", 0.1, 0.09, 0.09, _rise),
)
"""The vignette's table, and what is known of its file. 1.4 after 1.3 is a rise between 0 and 0.2."""

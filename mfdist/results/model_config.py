"""What ``config.json`` of an exported model must say: it may come from anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mfdist.json_tables import typed


@dataclass(frozen=True)
class TrainedDataset:
    """The dataset of a model."""

    name: str
    fingerprint: str
    num_users: int
    num_items: int
    split_fingerprint: str | None = None


@dataclass(frozen=True)
class Penalty:
    """What training minimised beside the errors, see ``model.objective``."""

    l2: tuple[float, ...] | None
    row_l2: tuple[float, ...] | None = None


@dataclass(frozen=True)
class UnitsOfRatings:
    """See ``model.units``."""

    mean: float
    spread: float


KINDS: dict[str, Any] = {
    "model": str, "dim": int, "bias": bool, "sigmoid": bool, "cold": str, "global_mean": float,
    "rating_scale": tuple[float, float], "rating_step": float, "dataset": TrainedDataset,
}  # fmt: skip
OPTIONAL_KINDS: dict[str, Any] = {
    "sigmoid_range": tuple[float, float] | None, "members": int | None, "implicit": float | None,
    "train_rmse": float | None, "penalty": Penalty | None, "units": UnitsOfRatings | None,
}  # fmt: skip
"""Keys that an export of an earlier version may lack."""


def check_config(config: dict[str, Any]) -> None:
    """ValueError names the first thing that is missing or cannot be; other keys may say what they like."""
    for key in KINDS:
        if key not in config:
            raise ValueError(f"it has no {key}")
    found = {key: typed(kind, config[key], key) for key, kind in KINDS.items()}
    found |= {key: typed(kind, config.get(key), key) for key, kind in OPTIONAL_KINDS.items()}
    span, members = found["sigmoid_range"], found["members"] or 0
    if min(found["dim"], found["dataset"].num_users, found["dataset"].num_items, members) < 0:
        raise ValueError("a number of rows, factors or members is below 0")
    if found["sigmoid"] and (span is None or not span[0] < span[1]):
        raise ValueError("it has a sigmoid and no range for it")
    if members and found["dim"] % members:
        raise ValueError(f"{members} members cannot share {found['dim']} factors")
    penalty, units = found["penalty"], found["units"]
    if penalty and penalty.row_l2 is not None and len(penalty.row_l2) != 6:
        raise ValueError("penalty.row_l2 is not of six numbers")
    figures = [found["global_mean"], found["rating_step"], *found["rating_scale"], *(span or ())]
    figures += [found["implicit"] or 0.0, found["train_rmse"] or 0.0]
    figures += [units.mean, units.spread] if units else []
    figures += [*(penalty.l2 or ()), *(penalty.row_l2 or ())] if penalty else []
    if not all(map(math.isfinite, figures)) or (units and not units.spread):
        raise ValueError("a figure of it is no finite number")

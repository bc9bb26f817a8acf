"""Which flags a run that is resumed may change, and what it says of those."""

from __future__ import annotations

import dataclasses
from typing import Any

from mfdist import storage
from mfdist.errors import UsageError
from mfdist.training.config import TrainConfig

MEANING = (
    "objective", "unobserved_weight", "ranking_penalty", "model", "emb_dim", "optimizer", "lr", "lr_schedule",
    "weight_decay", "l2", "row_l2", "reduction", "members", "offset", "rating_units", "init_std", "implicit", "betas",
    "eps", "batch_size", "seed", "wire_dtype", "init_from", "stop_fraction", "cold", "no_sigmoid", "no_bias", "no_init",
    "sigmoid_range",
)  # fmt: skip
"""Keys that a resumed run may not change: they would make it another run."""
PLACES = ("run_dir", "data", "resume", "overwrite")
"""Keys that say where and how a run goes on, not what it is."""


def changes(before: dict[str, Any], now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Keys whose value differs from a stored configuration: {key: (then, now)}."""
    after = dataclasses.asdict(now)
    return {
        key: (before[key], value)
        for key, value in after.items()
        if key in before and key not in PLACES and _plain(_found(key, before[key])) != _plain(_found(key, value))
    }


def _found(key: str, value: Any) -> Any:
    """A run that begins another, by the path that finds it from any folder (a run of 0.1 kept it as it was given)."""
    return storage.absolute(value) if key == "init_from" and value is not None else value


def check_changes(before: dict[str, Any], now: TrainConfig, finished: bool = False) -> list[str]:
    """Lines that show what changed since the run began; UsageError where that would change its meaning.

    A ``finished`` run may be lengthened: a schedule then ends at the new end, and its rate goes up again to what it
    would have been there.
    """
    changed = changes(before, now)
    lines = [f"{key.replace('_', '-')}: {then} -> {new}" for key, (then, new) in changed.items()]
    refused = [key for key in changed if key in MEANING]
    if "epochs" in changed and now.lr_schedule != "constant":
        done, wanted = changed["epochs"]
        if finished and wanted > done:
            rate = now.row_optimizer(wanted * 1000).rate(done * 1000 + 1)
            lines.append(
                f"the {now.lr_schedule} schedule: ends with epoch {wanted} now, goes on with a rate of {rate:.3g}"
            )
        else:
            refused.append("epochs")
    if refused:
        shown = "; ".join(line for line in lines if line.split(":")[0].replace("-", "_") in refused)
        raise UsageError(
            f"this run was begun with another configuration ({shown}). "
            "Give the old values, another --run-dir, or --overwrite."
        )
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

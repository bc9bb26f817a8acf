"""What the flags of training are with ``--objective ranking``: most of those of ratings have no meaning there.

A ranking is a plain dot product of two rows (``--model mf``, nothing beside it), solved side by side instead of by
steps of a rate, from all ratings at once, whatever their values. So its flags are few: ``--emb-dim``, ``--epochs``,
``--unobserved-weight``, ``--ranking-penalty``, ``--seed`` and what says where and how long a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from mfdist.config import Follows
from mfdist.errors import UsageError

FIXED: dict[str, Any] = {
    "model": "mf", "optimizer": "als", "lr": 1.0, "lr_schedule": "constant", "weight_decay": 0.0, "l2": (0.0,) * 6,
    "row_l2": (0.0,) * 6, "reduction": "sum", "members": 0, "offset": "learned", "rating_units": "given",
    "implicit": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "sharding": "row", "wire_dtype": "fp32",
    "init_from": None, "stop_fraction": 0.0, "patience": None, "cold": "own", "no_sigmoid": False, "no_bias": False,
    "no_init": False, "sigmoid_range": None,
}  # fmt: skip
OWN = {"unobserved_weight": 20.0, "ranking_penalty": 0.035}
"""Flags of a ranking alone, and their defaults."""
EMB_DIM, INIT_STD = 64, 0.1
REASONS = {
    "sharding": "its tables are cut by rows",
    "stop_fraction": "stop rows measure errors of ratings; give --epochs",
    "init_from": "it begins from small random rows",
}
OTHERWISE = "it learns what was chosen, not how it was rated"


def settled(values: Mapping[str, Any], fields: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """``values`` of all flags with those that are fixed put in; UsageError names one that was given otherwise."""
    for name, fixed in FIXED.items():
        value = values[name]
        if not isinstance(value, Follows) and value not in (fields[name].default, fixed):
            why = REASONS.get(name, OTHERWISE)
            raise UsageError(
                f"--{name.replace('_', '-')} {_shown(value)} has no meaning with --objective ranking: {why}."
            )
    own = {"emb_dim": EMB_DIM, "init_std": INIT_STD}
    follow = {name: value for name, value in own.items() if isinstance(values[name], Follows)}
    if isinstance(values["batch_size"], Follows):
        follow["batch_size"] = 0  # all ratings: the data decides
    return {**values, **FIXED, **follow}


def check_absent(values: Mapping[str, Any]) -> None:
    """UsageError where a flag of a ranking alone is given without one."""
    for name, default in OWN.items():
        if values[name] != default:
            raise UsageError(f"--{name.replace('_', '-')} needs --objective ranking.")
    if values["optimizer"] == "als":
        raise UsageError("--optimizer als needs --objective ranking.")


def _shown(value: Any) -> str:
    return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)

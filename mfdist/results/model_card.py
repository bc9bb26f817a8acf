"""The model card of an export: what the model is, how good, how to use it, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(config: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> str:
    """README.md of an export, with the figures of a finished run's report."""
    data = config["dataset"]
    terms = ["<p_u, q_i>"] + (["b_u", "b_i"] if config["bias"] else []) + (["offset"] if config["bias"] else [])
    score = " + ".join(terms)
    form = score if not config["sigmoid"] else "{0} + ({1} - {0}) * sigmoid({score})".format(
        *config["sigmoid_range"], score=score)  # fmt: skip
    low, high = config["rating_scale"]
    unknown = "its embedding and bias count as zero, so that the known side decides" if config["bias"] else (
        f"the prediction is the mean of the training ratings, {config['global_mean']:.4f}")  # fmt: skip
    return f"""---
library_name: mfdist
tags:
- matrix-factorization
- recommendation
---

# {config["model"]}, {config["dim"]} factors, on {data["name"]}

A matrix factorization of ratings from {low:g} to {high:g}: {data["num_users"]:,} users, {data["num_items"]:,} items.

    prediction = {form}

{_card_results(report)}## Use

```python
import mfdist

model = mfdist.load("RUN")  # the folder that holds model/
model.predict(["a user's id"], ["an item's id"])  # ratings, not clipped to the scale
model.recommend(["a user's id"], k=10)
```

Files: `model.safetensors` (float32 tables), `users.parquet` and `items.parquet` (row, id), `config.json`.
Loading runs no code from these files.

## Limits

- Rows that training never touched: `cold = "{config["cold"]}"` ({_COLD[config["cold"]]}).
- An id outside the vocabulary: {unknown}.
- The model knows who rated what, and nothing else of users or items.

Dataset fingerprint `{data["fingerprint"]}`.
"""


_COLD = {
    "own": "the model's own output from their initial values",
    "known-side": "zero embedding and zero bias",
}


def _card_results(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    final, floors = report["final"], report["floors"]
    rows = [(f"**this model**, epoch {final['epoch']}", final["val_rmse_clipped"], final.get("val_mae_clipped"))]
    rows += [(f"floor: {name.replace('_', ' ')}", floor["rmse"], floor["mae"]) for name, floor in floors.items()]
    lines = "\n".join(f"| {name} | {_figure(first)} | {_figure(second)} |" for name, first, second in rows)
    ratings = report["dataset"]["num_ratings"]
    return (
        f"## Results\n\nOn {ratings['val']:,} validation ratings, clipped to the scale; "
        f"trained on {ratings['train']:,}; {final['how_chosen']}.\n\n| | RMSE | MAE |\n|---|---|---|\n{lines}\n\n"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

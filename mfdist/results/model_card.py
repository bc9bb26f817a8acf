"""The model card of an export: what the model is, how good, how it was made, how to use it, and where it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mfdist.results import ranking_metrics

HERE_ALONE = ("data", "run_dir", "resume", "overwrite", "max_minutes", "keep", "keep_every", "checkpoint_every",
              "interface", "device", "max_memory")  # fmt: skip
"""Settings that say where and when, not what."""


def model_card(
    config: Mapping[str, Any], report: Mapping[str, Any] | None = None, validation: Mapping[str, Any] | None = None
) -> str:
    """README.md of an export, with the figures of a finished run's report and of ``ErrorSums.figures()``."""
    data = config["dataset"]
    terms = ["<p_u, q_i>"] + (["b_u", "b_i"] if config["bias"] else []) + (["offset"] if config["bias"] else [])
    score = " + ".join(terms)
    form = score if not config["sigmoid"] else "{0} + ({1} - {0}) * sigmoid({score})".format(
        *config["sigmoid_range"], score=score)  # fmt: skip
    low, high = config["rating_scale"]
    ranks = config.get("objective") == "ranking"
    what = "what users chose to rate" if ranks else f"ratings from {low:g} to {high:g}"
    outcome = "scores of preference: about 1 for what a user would choose, 0 for all else" if ranks else (
        "ratings, not clipped to the scale")  # fmt: skip
    fallback = 0.0 if ranks else config["global_mean"]
    unknown = "its embedding and bias count as zero, so that the known side decides" if config["bias"] else (
        f"the prediction is {'0' if ranks else f'the mean of the training ratings, {fallback:.4f}'}")  # fmt: skip
    return f"""---
library_name: mfdist
license: unknown # a model is bound by the terms of its ratings: write theirs here
tags:
- matrix-factorization
- recommendation
{_index(config, report)}---

# {plain(config["model"])}, {config["dim"]} factors, on {plain(data["name"])}

A matrix factorization of {what}: {data["num_users"]:,} users, {data["num_items"]:,} items.

    prediction = {form}

{_card_results(report, validation)}{_making(report)}## Use

```python
import mfdist

model = mfdist.load("RUN")  # the folder that holds model/
model.predict(["a user's id"], ["an item's id"])  # {outcome}
model.recommend(["a user's id"], k=10)
model.fold_in(["an item's id"], [5.0]).recommend(10)  # somebody whom training did not know
```

Files: `model.safetensors` (float32 tables), `users.parquet` and `items.parquet` (row, id), `config.json`.
Loading runs no code from these files.

## Limits

- Rows that training never touched: `cold = "{code(config["cold"])}"` ({_COLD.get(config["cold"], "unknown")}).
- An id outside the vocabulary: {unknown}.
- The model knows who rated what, and nothing else of users or items.

Dataset fingerprint `{code(data["fingerprint"])}`.
"""


_COLD = {
    "own": "the model's own output from their initial values",
    "known-side": "zero embedding and zero bias",
}


def _index(config: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """The figures where programs look for them (the model-index of model cards)."""
    if report is None or report["final"]["val_rmse_clipped"] is None:
        return ""
    data = json.dumps(report["dataset"]["name"])
    lines = ["model-index:", f"- name: {json.dumps(config['model'])}", "  results:", "  - task:",
             "      type: rating-prediction", "    dataset:", f"      name: {data}", f"      type: {data}",
             "    metrics:"]  # fmt: skip
    for name in ("rmse", "mae"):
        value = report["final"].get(f"val_{name}_clipped")
        lines += [f"    - type: {name}", f"      value: {value:.6f}"] if value is not None else []
    return "\n".join(lines) + "\n"


def _making(report: Mapping[str, Any] | None) -> str:
    """Settings as a TOML file, and the command that takes it."""
    if report is None:
        return ""
    settings = "\n".join(f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}"
                         for name, value in report["config"].items()
                         if value is not None and name not in HERE_ALONE)  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    ranks = f"{report['world_size']} rank{'s' if report['world_size'] > 1 else ''}"
    return (
        f"## How it was made\n\n    mfdist {report['job']} --config settings.toml --data DATA --run-dir RUN\n\n"
        f"with `settings.toml`\n\n```toml\n{settings}\n```\n\n"
        f"in {report['wall_seconds']:.0f} s on {ranks} ({report['device']}); {versions}.\n\n"
    )


def plain(text: str) -> str:
    """``text`` in Markdown as it stands: no markup of it, HTML included, means anything, and it stays on its line."""
    return re.sub(r"([\\`*_\[\]<>|&#~!$])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """``text`` between two backticks."""
    return " ".join(text.replace("`", "'").split())


def _card_results(report: Mapping[str, Any] | None, validation: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    final, floors = report["final"], report["floors"]
    if not floors and final["val_rmse"] is None:
        return f"## Results\n\n{_card_ranking(report['ranking'])}"
    rows = [(f"**this model**, epoch {final['epoch']}", final["val_rmse_clipped"], final.get("val_mae_clipped"))]
    rows += [(f"floor: {plain(name.replace('_', ' '))}", floor["rmse"], floor["mae"]) for name, floor in floors.items()]
    lines = "\n".join(f"| {name} | {_figure(first)} | {_figure(second)} |" for name, first, second in rows)
    ratings = report["dataset"]["num_ratings"]
    interval = (validation or {}).get("rmse_interval")
    within = ""
    if interval:
        within = "The 95% interval of this model's RMSE is {:.4f} to {:.4f} (bootstrap).\n\n".format(*interval)
    return (
        f"## Results\n\nOn {ratings['val']:,} validation ratings, clipped to the scale; "
        f"trained on {ratings['train']:,}; {plain(final['how_chosen'])}.\n\n"
        f"| | RMSE | MAE |\n|---|---|---|\n{lines}\n\n{within}"
        f"{_card_ranking(report['ranking'])}"
    )


def _card_ranking(ranking: Mapping[str, Any]) -> str:
    head = " | ".join(ranking_metrics.FIGURES.values())
    lines = "\n".join(
        f"| {name} | {' | '.join(_figure(value) for value in values)} |"
        for name, *values in ranking_metrics.rows({"**this model**": ranking})
    )
    doubt = ranking_metrics.doubt_about(ranking)
    rule = "|---" * (1 + len(ranking_metrics.FIGURES))
    return f"Lists of ten for {ranking_metrics.basis(ranking)}.\n\n| | {head} |\n{rule}|\n{lines}\n\n" + (
        f"{doubt[0].upper()}{doubt[1:]}\n\n" if doubt else ""
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

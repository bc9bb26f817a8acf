"""The files that a search leaves, renewed with every trial."""

from __future__ import annotations

import json
from typing import Any

from mfdist import storage
from mfdist.config import toml_of
from mfdist.tuning.page import search_page
from mfdist.tuning.results import BEST, PAGE, RESULT, Results, Trial


def write_results(run: str, data: str, results: Results) -> None:
    """RUN/tune.json, tune.html and, where there is a best trial, best.toml. ``data``: as it was given."""
    storage.write_text(storage.join(run, RESULT), json.dumps(_table(results), indent=1) + "\n")
    if results.best is not None:
        storage.write_text(storage.join(run, BEST), _best(results, results.best))
    storage.write_text(storage.join(run, PAGE), search_page(results, data, run))


def _best(results: Results, best: Trial) -> str:
    begun = "" if results.start is None else f" (where it began: {results.shown(results.start.error)})"
    name = " ".join(results.dataset.split())
    found = (
        f"# Found by mfdist tune on {name}: trial {best.number} of {len(results.trials)}, "
        f"{results.measure.label} {results.shown(best.error)}{begun},\n"
        f"# the mean over {len(results.splits)} inner splits of the training rows.\n"
    )
    return found + toml_of(results.settings)


def _table(results: Results) -> dict[str, Any]:
    measure = results.measure
    trials = [
        {"trial": t.number, "values": dict(t.values), "figure": None if t.error is None else measure.figure(t.error),
         "of_splits": [measure.figure(value) for value in t.errors], "seconds": t.seconds, "ended_early": t.why or None}
        for t in results.trials
    ]  # fmt: skip
    return {
        "dataset": results.dataset, "measure": measure.label, "splits": list(map(dict, results.splits)),
        "best": results.best.number if results.best else None,
        "start": results.start.number if results.start else None,
        "settings": {name.replace("_", "-"): value for name, value in results.settings.items()}, "trials": trials,
    }  # fmt: skip

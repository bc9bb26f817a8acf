"""The result of a run: report.json and validation.json for programs; report.html, loss.png and a model card for people.

Training and the baseline write the same keys (:data:`KEYS`), so that every tool reads both.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfdist import __version__, storage
from mfdist.data.dataset import Manifest
from mfdist.results import exported_model
from mfdist.results.loss_plot import loss_plot
from mfdist.results.run_page import run_page

KEYS = (
    "job", "model", "dataset", "world_size", "device", "seed", "config", "epochs", "final", "best_on_val", "slices",
    "floors", "ranking", "wall_seconds", "peak_rss_bytes", "peak_device_bytes", "versions",
)  # fmt: skip
EPOCH_KEYS = ("epoch", "train_rmse", "val_rmse", "val_mae", "seconds", "ratings_per_second")
RESULT_KEYS = ("epoch", "val_rmse", "val_mae", "val_rmse_rounded", "val_mae_rounded", "val_rmse_clipped", "how_chosen")
BEST_CHOICE = "lowest validation RMSE, the vignette's convention: picked on the rows it is reported on"


def new_report(
    *,
    job: str,
    model: str,
    manifest: Manifest,
    world_size: int,
    device: str,
    seed: int,
    config: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    final: Mapping[str, Any],
    best_on_val: Mapping[str, Any],
    slices: Mapping[str, Any],
    floors: Mapping[str, Any],
    ranking: Mapping[str, Any],
    wall_seconds: float,
    peak_rss_bytes: int | None = None,
    peak_device_bytes: int = 0,
) -> dict[str, Any]:
    """report.json's table. ``epochs``: dicts of EPOCH_KEYS; ``final`` and ``best_on_val``: made by :func:`result`.

    ``slices`` is SliceSums.summary()["slices"], ``floors`` evaluate.floors(), ``ranking`` ranking.rank_metrics().
    ``peak_rss_bytes``: the largest of all ranks; this process's where not given. NaN and infinities become null.
    """
    for epoch in epochs:
        assert set(EPOCH_KEYS) <= set(epoch), f"an epoch lacks {set(EPOCH_KEYS) - set(epoch)}"
    for figures in (final, best_on_val):
        assert set(RESULT_KEYS) <= set(figures), f"a result lacks {set(RESULT_KEYS) - set(figures)}"
    report = {
        "job": job,
        "model": model,
        "dataset": {
            "name": manifest.name, "fingerprint": manifest.fingerprint, "num_users": manifest.num_users,
            "num_items": manifest.num_items, "num_ratings": dict(manifest.num_ratings),
        },
        "world_size": world_size,
        "device": device,
        "seed": seed,
        "config": dict(config),
        "epochs": [dict(epoch) for epoch in epochs],
        "final": dict(final),
        "best_on_val": dict(best_on_val),
        "slices": dict(slices),
        "floors": dict(floors),
        "ranking": dict(ranking),
        "wall_seconds": wall_seconds,
        "peak_rss_bytes": peak_rss() if peak_rss_bytes is None else peak_rss_bytes,
        "peak_device_bytes": peak_device_bytes,
        "versions": versions(),
    }  # fmt: skip
    finite: dict[str, Any] = _finite(report)
    return finite


def result(epoch: int, headline: Mapping[str, Any], how_chosen: str) -> dict[str, Any]:
    """``final`` or ``best_on_val``: an epoch (from 1), SliceSums.summary()["headline"] of it, and why this epoch."""
    return {"epoch": epoch, **headline, "how_chosen": how_chosen}


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss() -> int:
    """The resident memory of this process now, in bytes."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    """Versions of mfdist, Python and of the libraries that the figures depend on, where they are installed."""
    found = {"mfdist": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "numba", "pyarrow", "polars", "scikit-surprise"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).parents[2] / ".git")
    return found | ({"commit": commit} if commit else {})


def _commit(git: Path) -> str | None:
    """The commit of the checkout that this package runs from; None where it is installed without one."""
    try:
        if git.is_file():  # a work tree names the folder that it belongs to
            git = Path(git.read_text().split(":", 1)[1].strip())
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        name = head.removeprefix("ref: ")
        if (common / name).exists():
            return (common / name).read_text().strip()[:12]
        packed = [line.split() for line in (common / "packed-refs").read_text().splitlines()]
        return next((line[0][:12] for line in packed if line[-1] == name), None)
    except (OSError, IndexError):
        return None


def write_report(
    run: str, report: Mapping[str, Any], validation: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> None:  # fmt: skip
    """Write RUN/report.json, report.html, loss.png and, where there is an export, its model card; one rank calls.

    ``validation`` (``ErrorSums.figures()`` of the epoch that counts) becomes RUN/validation.json and, with ``records``
    (those of metrics.jsonl), the page's pictures.
    """
    assert set(report) == set(KEYS), f"keys differ: {set(report) ^ set(KEYS)}"
    storage.write_bytes(storage.join(run, "loss.png"), loss_plot(report))
    if validation is not None:
        validation = _finite(validation)
        storage.write_text(storage.join(run, "validation.json"), _json(validation))
    page = run_page(report, validation, records, storage.redact(run))
    storage.write_text(storage.join(run, "report.html"), page)
    exported_model.write_card(run, report, validation)
    storage.write_text(storage.join(run, "report.json"), _json(report))


def _json(table: Any) -> str:
    return json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None (JSON has neither) and tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value

"""What a run finds of an epoch that it has ended: errors of ratings, or the ranking."""

from __future__ import annotations

import time
from typing import Any

from mfdist import compilation
from mfdist.results.ranking_metrics import FIGURES, HEADLINE
from mfdist.training.session import Session


def measure_epoch(session: Session, epoch: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of ``epoch`` (from 0): its record for the report, what metrics.jsonl says beside, ``SliceSums.summary()``.

    The tables are settled. With stop rows their error is added to the progress. Collective.
    """
    progress, config = session.progress, session.config
    began, compiled = time.monotonic(), compilation.seconds()
    summary, ranked = _measured(session)
    if config.stop_fraction:
        with session.console.progress("measure the stop rows", session.loader.num_stop_rows) as bar:
            errors = session.validation.errors(
                session.model, "stop", config.stop_fraction, config.seed, advance=bar.advance
            )
        progress.stop_rmse.append(errors.summary()["headline"]["val_rmse"] or 0.0)
    clipped = summary["headline"]
    record = {
        "epoch": epoch + 1,
        "train_rmse": (progress.squared_error / max(1, progress.rows)) ** 0.5,
        "val_rmse": clipped["val_rmse"],
        "val_mae": clipped["val_mae"],
        "val_rmse_clipped": clipped["val_rmse_clipped"],
        "val_mae_clipped": clipped["val_mae_clipped"],
        "seconds": progress.seconds,
        "ratings_per_second": progress.rows / max(progress.seconds, 1e-9),
    }
    if ranked:
        record["val_ndcg"] = ranked[HEADLINE]
    beside = {
        "stop_rmse": progress.stop_rmse[-1] if progress.stop_rmse else None,
        "validation_seconds": time.monotonic() - began - (compilation.seconds() - compiled), **ranked,
    }  # fmt: skip
    return record, beside, summary


def _measured(session: Session) -> tuple[dict[str, Any], dict[str, Any]]:
    """``SliceSums.summary()`` of the validation rows, and the figures of a ranking; either is of nothing."""
    if session.config.is_ranking:
        with session.console.busy("measuring the recommendations of some thousand users"):
            ranking = session.validation.ranking(session.model)
        return session.validation.no_errors().summary(), {key: ranking[key] for key in FIGURES}
    with session.console.progress("validate", session.dataset.manifest.num_ratings["val"]) as bar:
        return session.validation.errors(session.model, advance=bar.advance).summary(), {}

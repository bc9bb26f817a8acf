"""What a run measures of itself while it trains: the note behind the bar, and the ``interval`` records.

An interval is what lies between two records: one is written every INTERVAL_SECONDS, at the end of an epoch and before a
checkpoint, so that a run that is resumed from it goes on with the next interval, without gap or repetition. Seconds of
waiting are those of the rank that waited longest; compilation is no part of any rate, and a record of its own.
"""

from __future__ import annotations

import time

from mfdist import compilation
from mfdist.model.cpu_step import FusedStep
from mfdist.results.report import peak_rss
from mfdist.training.session import Session

INTERVAL_SECONDS = 5.0


class Meter:
    """Of one epoch, or of what is left of it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._began = time.monotonic()
        self._compiled = compilation.seconds()
        self._rows = session.progress.rows
        self._data_before = session.loader.stats.wait_seconds
        self._ranks_before = self._by_messages()
        self._waited = 0.0
        self._data_seconds = self._ranks_seconds = self._peak_bytes = 0.0
        self._written = (0.0, 0.0)
        self.shown = ""
        """For the bar: step, running RMSE, the shares of time spent waiting, memory."""

    def waited(self, seconds: float) -> None:
        """This rank waited so long for the others at a check."""
        self._waited += seconds

    def values(self) -> list[float]:
        """Of this rank, for the ranks to take the maximum of: seconds of this epoch spent waiting for data and for
        other ranks (in memory that they share the waits within a step are not told apart), and bytes of memory."""
        data = self._session.loader.stats.wait_seconds - self._data_before
        return [data, self._by_messages() - self._ranks_before + self._waited, float(peak_rss())]

    def take(self, most: list[float]) -> None:
        """The maximum over all ranks of :meth:`values`."""
        self._data_seconds, self._ranks_seconds, self._peak_bytes = most

    def write(self, epoch: int, *, at_once: bool) -> None:
        """The ``interval`` record, where one is due or it must be written ``at_once``; renews ``shown``."""
        session, progress, now = self._session, self._session.progress, time.monotonic()
        rmse = (progress.squared_error / max(1, progress.rows)) ** 0.5
        self._show(rmse)
        compiled = compilation.seconds() - self._compiled
        spent = now - self._began
        rows = progress.rows - self._rows
        if not rows or (spent - compiled < INTERVAL_SECONDS and not at_once):
            return
        where = {"step": progress.step, "epoch": epoch + 1}
        if compiled > 0:
            session.metrics.write("compile", **where, seconds=compiled)
        data, ranks = self._data_seconds - self._written[0], self._ranks_seconds - self._written[1]
        session.metrics.write(
            "interval", **where, train_rmse=rmse, ratings_per_second=rows / max(spent - compiled, 1e-9),
            learning_rate=session.optimizer.rate(progress.step), seconds=spent - compiled, wait_seconds=data,
            ranks_wait_seconds=ranks, memory_bytes=int(self._peak_bytes),
        )  # fmt: skip
        self._began, self._rows, self._compiled = now, progress.rows, self._compiled + compiled
        self._written = (self._data_seconds, self._ranks_seconds)

    def _show(self, rmse: float) -> None:
        progress = self._session.progress
        spent = max(progress.seconds, 1e-9)
        waits = f"waits: data {min(1.0, self._data_seconds / spent):.0%}"
        if self._session.world.size > 1:
            waits += f", ranks {min(1.0, self._ranks_seconds / spent):.0%}"
        parts = f"step {progress.step:,}", f"rmse {rmse:.4f}", waits, f"{self._peak_bytes / 2**30:.2f} GiB"
        self.shown = " | ".join(parts)

    def _by_messages(self) -> float:
        """Seconds that this rank has waited for messages of ranks on other hosts so far."""
        fused = self._session.fused
        return fused.traffic["wait_seconds"] if isinstance(fused, FusedStep) else 0.0

"""Why a run should stop at the next step boundary: a signal, a STOP file, a deadline. Nothing here acts on it.

A handler only sets a flag (the same signal may come twice under Slurm); the ranks agree by a collective, write a
checkpoint and leave with exit code 75.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from mfdist import process, storage

DEADLINE_MARGIN_SECONDS = 60.0


class StopWatch:
    """Use as a context manager around training, in the main thread. ``run`` None: there is no STOP file to look for."""

    def __init__(self, run: str | None, max_minutes: float | None) -> None:
        self._stop_file = storage.join(run, "STOP") if run else None
        self._signal: str | None = None
        self._deadlines: list[tuple[float, str]] = []
        self._previous: dict[signal.Signals, Any] = {}
        if max_minutes is not None:
            self._deadlines.append((time.time() + 60 * max_minutes, f"--max-minutes {max_minutes:g} are over"))
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if end.isdigit():  # a partition without a limit may say anything else
            self._deadlines.append((int(end) - DEADLINE_MARGIN_SECONDS, "the Slurm job's time is nearly over"))

    def reason(self) -> str | None:
        """Why this rank should stop, or None."""
        if self._signal:
            return f"received {self._signal}"
        for when, text in self._deadlines:
            if time.time() >= when:
                return text
        if self._stop_file and storage.exists(self._stop_file):
            return "found the file STOP"
        return None

    def clear_stop_file(self) -> None:
        if self._stop_file:
            storage.remove(self._stop_file)

    def __enter__(self) -> StopWatch:
        for number in process.stop_signals():
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

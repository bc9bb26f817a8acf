"""What a run says: lines on the console, a progress bar on a terminal, and ``metrics.jsonl``.

Only rank 0 speaks. On a terminal the bar is redrawn in place; elsewhere a plain line every ten seconds.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

from tqdm import tqdm

from mfdist import storage

PLAIN_INTERVAL_SECONDS = 10.0


class Console:
    """Lines and progress of one process; ``speaks`` is False on every rank but the first."""

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks

    def info(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        if self.speaks:
            tqdm.write(f"warning: {text}", file=sys.stderr)
            sys.stderr.flush()

    def progress(self, label: str, total: int, start: int = 0, unit: str = "ratings") -> Progress:
        return Progress(label, total, start, unit, self.speaks)


class Progress:
    """How far a pass of ``total`` units is, with rate and time left. Use as a context manager."""

    def __init__(self, label: str, total: int, start: int, unit: str, speaks: bool) -> None:
        self._label, self._total, self._unit, self._done, self._start = label, total, unit, start, start
        self._began = self._spoke = time.monotonic()
        self._speaks = speaks
        self._bar = None
        if speaks and sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total, initial=start, unit=" " + unit, unit_scale=True, leave=False)

    def advance(self, units: int, note: str = "") -> None:
        """``units`` more are done; ``note`` stands behind the line when one is shown."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
        now = time.monotonic()
        if self._speaks and now - self._spoke >= PLAIN_INTERVAL_SECONDS:
            self._spoke = now
            if self._bar is not None:
                self._bar.set_postfix_str(note, refresh=False)
            else:
                print(self._line(now, note), flush=True)

    def _line(self, now: float, text: str) -> str:
        rate = (self._done - self._start) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate else math.inf
        share = 100 * self._done / max(self._total, 1)
        shown = time.strftime("%H:%M:%S", time.gmtime(left)) if math.isfinite(left) else "unknown"
        speed = f"{rate / 1e6:.3f} M" if self._unit == "ratings" or rate >= 1e6 else f"{rate:,.0f}"
        return f"{self._label} {share:.0f}% | {speed} {self._unit}/s | eta {shown}{' | ' if text else ''}{text}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


class MetricsLog:
    """``RUN/metrics.jsonl``, a record a line: {"kind", "step", "epoch" (from 1), ...}; path None: nothing is written.

    On an object store appending can mean overwriting, so there the records are kept in memory and the whole
    file is uploaded by :meth:`publish`, which a run calls at each checkpoint and at its end.
    """

    def __init__(self, path: str | None, keep_until_step: int | None = None) -> None:
        """Records past ``keep_until_step`` are dropped (None: the file starts empty)."""
        self._path = path
        self._lines: list[str] = []
        if path is None:
            return
        if keep_until_step is not None and storage.exists(path):
            self._lines = [line for line in storage.read_text(path).splitlines() if _step_of(line) <= keep_until_step]
        storage.write_text(path, "".join(line + "\n" for line in self._lines))

    def write(self, kind: str, **values: Any) -> None:
        if self._path is None:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        line = json.dumps({key: _finite(value) for key, value in record.items()})
        self._lines.append(line)
        if storage.is_local(self._path):
            with open(storage.local_path(self._path), "a") as stream:
                stream.write(line + "\n")

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in map(json.loads, self._lines) if record["kind"] == kind]

    def publish(self) -> None:
        if self._path is not None and not storage.is_local(self._path):
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))


def _step_of(line: str) -> float:
    """The step of a record; a line cut off by a kill belongs to no step that is kept."""
    try:
        return float(json.loads(line).get("step", 0))
    except json.JSONDecodeError:
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

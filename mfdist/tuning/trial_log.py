"""Where Optuna keeps its trials: RUN/trials.jsonl, an operation a line, on any file system that mfdist knows.

One process writes (it holds the directory's lease), so that no lock is needed and none can be left behind by a kill.
A line that a kill has cut off never happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from mfdist import storage
from mfdist.errors import DataError


class TrialLog(BaseJournalBackend):
    """Operations in memory and in a file; DataError where a whole line of that is no operation."""

    def __init__(self, path: str, check: Callable[[], None]) -> None:
        """``check`` is called before anything is written, and raises where the directory is another job's by now."""
        self._path, self._check = path, check
        self._lines: list[str] = []
        if not storage.exists(path):
            return
        text = storage.read_bytes(path).decode(errors="replace")
        self._lines = text.splitlines()
        if text and not text.endswith("\n"):
            self._lines.pop()
            check()
            storage.write_text(path, self._text())
        for number, line in enumerate(self._lines, 1):
            try:
                if not isinstance(json.loads(line), dict):
                    raise ValueError
            except (ValueError, RecursionError):
                raise DataError(
                    f"{storage.redact(path)}, line {number}, is damaged; --overwrite begins the search anew."
                ) from None

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return [json.loads(line) for line in self._lines[log_number_from:]]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._check()
        new = [json.dumps(log, separators=(",", ":")) for log in logs]
        self._lines += new
        if not storage.is_local(self._path):
            storage.write_text(self._path, self._text())
            return
        with open(storage.local_path(self._path), "a") as stream:
            stream.write("".join(line + "\n" for line in new))
            stream.flush()
            os.fsync(stream.fileno())

    def _text(self) -> str:
        return "".join(line + "\n" for line in self._lines)

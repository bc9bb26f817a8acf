"""What a run says: lines on the console, progress while it works, and ``metrics.jsonl``.

Only rank 0 speaks. On a terminal a bar is redrawn in place every second, whether or not anything moves; elsewhere there
is a plain line every ten seconds. So a job that is at work is never silent. Time in which kernels are compiled is said
to be that, and is no part of rates and of the time left.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from mfdist import compilation, process, storage

PLAIN_INTERVAL_SECONDS = 10.0
REDRAW_SECONDS = 1.0
PATIENCE_SECONDS = 0.7
"""How long work of unknown length may stay unsaid: shorter work is not worth a line."""


class Console:
    """Lines and progress of one process; ``speaks`` is False on every rank but the first.

    A console that is gone (``train | head``, a closed terminal, a full disk) ends nothing: lines that cannot be shown
    go to :meth:`instead`.
    """

    def __init__(self, speaks: bool = True, aside: bool = False) -> None:
        """``aside``: progress goes to stderr, of a job that prints its result on stdout."""
        self.speaks, self._aside = speaks, aside
        self._unshown: list[str] = []
        self._instead: Callable[[str], None] | None = None

    def info(self, text: str) -> None:
        if self.speaks and not _show(text, sys.stdout):
            self._keep(text)

    def warn(self, text: str) -> None:
        if self.speaks and not _show(f"warning: {text}", sys.stderr):
            self._keep(f"warning: {text}")

    def instead(self, write: Callable[[str], None]) -> None:
        """Give ``write`` the lines that could not be shown so far, and those to come."""
        self._instead = write
        while self._unshown:
            write(self._unshown.pop(0))

    def _keep(self, text: str) -> None:
        if self._instead is not None:
            self._instead(text)
        else:
            self._unshown.append(text)

    def progress(self, label: str, total: int, start: int = 0, unit: str = "ratings") -> Progress:
        """``total`` units of known number, ``start`` of them done before."""
        return Progress(label, total, start, unit, self.speaks, self._aside)

    def busy(self, label: str) -> Progress:
        """Work of unknown length: said with the time that it takes, where it takes any."""
        return Progress(label, None, 0, "", self.speaks, self._aside)


class Progress:
    """How far a pass of ``total`` units is, with rate and time left. Use as a context manager.

    ``total`` None: only the time so far is shown. A thread redraws the bar, or prints the line that is due, also while
    :meth:`advance` is not called.
    """

    def __init__(self, label: str, total: int | None, start: int, unit: str, speaks: bool, aside: bool = False) -> None:
        self._label, self._total, self._unit, self._done, self._start = label, total, unit, start, start
        self._began = self._spoke = time.monotonic()
        self._compiled_before = self._left_out = compilation.seconds()
        self._note, self._speaks, self._said, self._aside = "", speaks, False, aside
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: Any = None
        self._terminal = speaks and sys.stderr.isatty()
        if self._terminal and total is not None:
            self._bar = _bar(desc=label, total=total, initial=start, unit=" " + unit, unit_scale=True)

    def advance(self, units: int, note: str = "") -> None:
        """``units`` more are done; ``note`` stands behind the line when one is shown."""
        self._done += units
        self._note = note or self._note
        if self._bar is not None:
            self._leave_out_compilation()
            self._bar.update(units)
        if self._speaks and not self._terminal:
            self._plain_line_if_due()

    def reach(self, done: int) -> None:
        """As :meth:`advance`, up to a number of units that is done by now; nothing where it is no more than before."""
        if done > self._done:
            self.advance(done - self._done, self._note)

    def _look(self) -> None:
        """The thread: redraw, or speak, until the end."""
        wait = PATIENCE_SECONDS if self._total is None else REDRAW_SECONDS
        while not self._end.wait(wait):
            wait = REDRAW_SECONDS
            if self._bar is None and self._terminal:
                self._bar = _bar(desc=self._label, bar_format="{desc}: {elapsed}{postfix}")
            elif self._bar is not None:
                self._leave_out_compilation()
                self._bar.refresh()
            elif compilation.first_spell():
                self._print(f"compiling kernels, {compilation.USUALLY} ...")
            elif self._total is None and not self._said:
                self._print(f"{self._label} ...")
            else:
                self._plain_line_if_due()

    def _leave_out_compilation(self) -> None:
        """The bar's time is without compilation, whose time stands behind it while it lasts."""
        compiled = compilation.seconds()
        self._bar.start_t += compiled - self._left_out
        self._bar.last_print_t += compiled - self._left_out
        self._left_out = compiled
        note = self._note
        if compilation.under_way():
            note = f"compiling kernels, {compilation.USUALLY}: {compiled - self._compiled_before:.0f} s"
        self._bar.set_postfix_str(note, refresh=False)

    def _plain_line_if_due(self) -> None:
        now = time.monotonic()
        if now - self._spoke >= PLAIN_INTERVAL_SECONDS:
            self._print(self._line(now))

    def _print(self, text: str) -> None:
        self._spoke, self._said = time.monotonic(), True
        self._write(text)

    def _line(self, now: float) -> str:
        compiled = compilation.seconds() - self._compiled_before
        if compilation.under_way():
            return f"compiling kernels, {compilation.USUALLY}: {compiled:.0f} s so far"
        spent = now - self._began - compiled
        if self._total is None:
            return f"{self._label}: {spent:.0f} s so far"
        rate = (self._done - self._start) / max(spent, 1e-9)
        if not rate:
            return f"{self._label} {self._done}/{self._total} {self._unit} | {spent:.0f} s so far"
        left = (self._total - self._done) / rate
        share = 100 * self._done / max(self._total, 1)
        shown = time.strftime("%H:%M:%S", time.gmtime(left))
        speed = f"{rate:,.{0 if rate >= 10 else 2}f}"
        if self._unit == "ratings" or rate >= 1e6:
            speed = f"{rate / 1e6:.3f} M"
        note = f" | {self._note}" if self._note else ""
        return f"{self._label} {share:.0f}% | {speed} {self._unit}/s | eta {shown}{note}"

    def __enter__(self) -> Progress:
        if self._speaks:
            self._thread = threading.Thread(target=self._look, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()
        compiled = compilation.seconds() - self._compiled_before
        seconds = time.monotonic() - self._began - compiled
        if self._speaks and error[0] is None and compiled > 2:
            self._write(f"kernels compiled in {compiled:.0f} s; they are kept for the next time")
        if self._total is None and error[0] is None and (self._said or (self._bar is not None and seconds > 2)):
            self._write(f"{self._label}: {seconds:.0f} s")

    def _write(self, text: str) -> None:
        _show(text, sys.stderr if self._aside else sys.stdout)


def _bar(**options: Any) -> Any:
    """A bar as wide as the terminal; some terminals, as in containers, say that they have no columns at all."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    width: dict[str, Any] = {"dynamic_ncols": True} if columns else {"ncols": 80}
    return tqdm(leave=False, **width, **options)


def _show(text: str, stream: Any) -> bool:
    """Write a line, above the bars that there are; False where it was not shown."""
    try:
        tqdm.write(process.visible(text), file=stream)
        stream.flush()
    except OSError:
        process.silence(stream)
        return False
    return not getattr(stream, "gone", False)


Record = dict[str, Any]


class MetricsLog:
    """``RUN/metrics.jsonl``, a record a line: {"kind", "step", "epoch" (from 1), ...}; path None: nothing is written.

    On an object store appending can mean overwriting, so there the records are kept in memory and the whole
    file is uploaded by :meth:`publish`, which a run calls at each checkpoint and at its end.
    """

    def __init__(
        self, path: str | None, keep_until_step: int | None = None, listen: Callable[[Record], None] | None = None
    ) -> None:
        """Records past ``keep_until_step`` are dropped (None: the file starts empty).

        ``listen`` is called with every record that is kept, and then with every one that is written.
        """
        self._path, self._listen = path, listen
        self._lines: list[str] = []
        if path is None:
            return
        if keep_until_step is not None and storage.exists(path):
            text = storage.read_bytes(path).decode(errors="replace")
            self._lines = [line for line in text.splitlines() if _step_of(line) <= keep_until_step]
        storage.write_text(path, "".join(line + "\n" for line in self._lines))
        if listen is not None:
            for line in self._lines:
                listen(json.loads(line))

    def write(self, kind: str, **values: Any) -> None:
        if self._path is None:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        record = {key: _finite(value) for key, value in record.items()}
        line = json.dumps(record)
        self._lines.append(line)
        if storage.is_local(self._path):
            with open(storage.local_path(self._path), "a") as stream:
                stream.write(line + "\n")
        if self._listen is not None:
            self._listen(record)

    def records(self, kind: str | None = None) -> list[Record]:
        """Those of one kind, or all."""
        return [record for record in map(json.loads, self._lines) if kind in (None, record["kind"])]

    def publish(self) -> None:
        if self._path is not None and not storage.is_local(self._path):
            storage.write_text(self._path, "".join(line + "\n" for line in self._lines))


def _step_of(line: str) -> float:
    """The step of a record; a line cut off by a kill, or one that is no record, belongs to no step that is kept."""
    try:
        record = json.loads(line)
        return float(record.get("step", 0)) if isinstance(record["kind"], str) and record["time"] >= 0 else math.inf
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Programs at a terminal: what they write to it, when, and how long it stays silent."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SILENT_SECONDS = 600.0
"""After so much silence a program is given up."""


@dataclass
class Watched:
    """``text``: all that was written. ``silences``: (seconds, what stood there before), the longest first."""

    text: str
    code: int
    seconds: float
    silences: list[tuple[float, str]] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """What stays on the screen: of what was written over with a carriage return, the last."""
        kept = []
        for line in self.text.replace("\r\n", "\n").split("\n"):
            shown = ""
            for part in re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line).split("\r"):
                shown = part + shown[len(part) :]
            if shown.strip():
                kept.append(shown.rstrip())
        return kept


def watch(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, columns: int = 120
) -> Watched:
    """Run ``command`` in ``folder`` at a terminal ``columns`` wide, until it ends."""
    began = time.monotonic()
    process, screen = pty.fork()
    if process == 0:
        try:
            os.chdir(folder)
            os.execvpe(command[0], list(command), {**os.environ, **(environment or {}), "TERM": "xterm"})
        finally:
            os._exit(127)
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written, last, silences = b"", began, []
    try:
        while select.select([screen], [], [], SILENT_SECONDS)[0]:
            try:
                more = os.read(screen, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not more:
                break
            now = time.monotonic()
            silences.append((now - last, written[-200:].decode(errors="replace")))
            written, last = written + more, now
        else:
            os.kill(process, 9)
    finally:
        os.close(screen)
        _, status = os.waitpid(process, 0)
    ended = time.monotonic()
    silences.append((ended - last, written[-200:].decode(errors="replace")))
    text = written.decode(errors="replace")
    return Watched(text, os.waitstatus_to_exitcode(status), ended - began, sorted(silences, reverse=True))

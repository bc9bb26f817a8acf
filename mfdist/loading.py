"""A word while a program loads its libraries or meets its ranks: seconds, on a slow disk or a busy machine."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

PATIENCE_SECONDS = 1.0
TEXT = "loading ..."


@contextlib.contextmanager
def loading(text: str = TEXT) -> Iterator[None]:
    """Around the imports of a program, or another wait before its console stands: says ``text`` on a terminal where it
    takes longer, in the first rank of a host, and leaves no trace."""
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    done, said = threading.Event(), threading.Event()

    def speak() -> None:
        seconds = 0
        while not done.wait(PATIENCE_SECONDS):
            said.set()
            seconds += 1
            sys.stderr.write(f"\r{text} {seconds} s")
            sys.stderr.flush()

    thread = threading.Thread(target=speak, name="loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if said.is_set():
            sys.stderr.write("\r" + " " * (len(text) + 8) + "\r")
            sys.stderr.flush()

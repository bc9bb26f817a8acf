"""Texts that people see, kept as files: ``MFDIST_UPDATE_SNAPSHOTS=1`` writes them anew, for somebody to read."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"


def check(name: str, text: str) -> None:
    """Compare ``text`` with the file ``name``."""
    path = FOLDER / name
    if os.environ.get("MFDIST_UPDATE_SNAPSHOTS"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{name} differs: read it, and write it anew with MFDIST_UPDATE_SNAPSHOTS=1"

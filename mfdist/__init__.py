"""mfdist: distributed batch training of matrix factorization on large rating files.

``mfdist.prepare_frame(frame, out)`` and ``mfdist.load(run)`` are imported on first use,
so that ``import mfdist`` stays light.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"
__all__ = ["__version__", "load", "prepare_frame"]


def __getattr__(name: str) -> Any:
    if name in ("prepare_frame", "load"):
        from mfdist import api

        return getattr(api, name)
    raise AttributeError(f"module 'mfdist' has no attribute '{name}'")

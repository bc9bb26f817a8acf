"""``python -m mfdist.launch``: torchrun with exit codes, see :mod:`mfdist.cluster.launch`."""

from __future__ import annotations

from mfdist import process
from mfdist.errors import exit_code_of
from mfdist.loading import loading

with loading():
    from mfdist.cluster.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(exit_code_of(main))

"""``python -m mfdist.launch``: torchrun with exit codes, see :mod:`mfdist.cluster.launch`."""

from __future__ import annotations

import sys

from mfdist.cluster.launch import main
from mfdist.errors import exit_code_of

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(exit_code_of(main))

#!/usr/bin/env python
"""Look after the checkpoints of a run: list them, check every byte, remove old ones.

The program is :mod:`mfdist.jobs.checkpoint`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.checkpoint import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

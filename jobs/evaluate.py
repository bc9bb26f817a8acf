#!/usr/bin/env python
"""Evaluate runs on their validation rows: one table with floors, slices and tested differences.

The program is :mod:`mfdist.jobs.evaluate`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.evaluate import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

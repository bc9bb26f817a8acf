#!/usr/bin/env python
"""Make a dataset directory of raw ratings.

The program is :mod:`mfdist.jobs.prepare`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.prepare import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

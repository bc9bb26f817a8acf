#!/usr/bin/env python
"""Surprise's SVD with its defaults on a prepared dataset: the baseline, on the very same split.

The program is :mod:`mfdist.jobs.baseline`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.baseline import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

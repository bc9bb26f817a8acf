#!/usr/bin/env python
"""Train a matrix factorization model on a prepared dataset.

The program is :mod:`mfdist.jobs.train`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.train import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

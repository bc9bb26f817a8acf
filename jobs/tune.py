#!/usr/bin/env python
"""Search for settings of training, on inner splits of the training rows.

The program is :mod:`mfdist.jobs.tune`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.tune import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

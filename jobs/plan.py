#!/usr/bin/env python
"""Say what a training run will take, for any number of ranks, before it is submitted. Takes no device.

The program is :mod:`mfdist.jobs.plan`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.plan import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

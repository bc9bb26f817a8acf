#!/usr/bin/env python
"""Compile the kernels of all jobs ahead, once a machine.

The program is :mod:`mfdist.jobs.compile`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.compile import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

#!/usr/bin/env python
"""Make synthetic ratings with a known noise floor.

The program is :mod:`mfdist.jobs.synthesize`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.synthesize import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

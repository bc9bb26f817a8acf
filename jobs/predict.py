#!/usr/bin/env python
"""Score files of pairs: the same pairs with predictions beside, as Parquet or CSV.

The program is :mod:`mfdist.jobs.predict`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.predict import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

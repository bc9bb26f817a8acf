#!/usr/bin/env python
"""Write the top items of users as Parquet: user_id, item_id, rank, score.

The program is :mod:`mfdist.jobs.recommend`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.recommend import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

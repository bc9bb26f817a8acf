#!/usr/bin/env python
"""Write what is most like each item, or user: item_id (or user_id), similar_id, rank, score.

The program is :mod:`mfdist.jobs.similar`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.similar import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

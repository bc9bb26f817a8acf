#!/usr/bin/env python
"""Search for settings of training, on inner splits of the training rows.

The program is :mod:`mfdist.jobs.tune`.
"""

import sys

from mfdist.loading import loading

with loading():
    from mfdist.jobs.tune import job, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(job())

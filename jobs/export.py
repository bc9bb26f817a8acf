#!/usr/bin/env python
"""Write a model's vectors for faiss, hnswlib, Parquet or safetensors.

The program is :mod:`mfdist.jobs.export`.
"""

from mfdist import process
from mfdist.loading import loading

with loading():
    from mfdist.jobs.export import job, main

__all__ = ["main"]

if __name__ == "__main__":
    process.end(job())

"""Arrays that every task reads: sent once to each executor, and mapped into the memory of its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.prepare.ids import RowTable


@dataclass(frozen=True)
class SharedArray:
    """An array by its name among Spark's files; ``size`` its length."""

    name: str
    size: int

    @property
    def array(self) -> npt.NDArray[Any]:
        return _mapped(self.name)


def share(spark: Any, folder: str, name: str, values: npt.NDArray[Any]) -> SharedArray:
    """Send an array to all executors; ``name`` must be new to the session."""
    path = os.path.join(folder, f"{name}.npy")
    np.save(path, values)
    spark.sparkContext.addFile(path)
    return SharedArray(f"{name}.npy", values.size)


def path_of(name: str) -> str:
    """Where a shared file lies on this executor."""
    from pyspark import SparkFiles

    return str(SparkFiles.get(name))


@lru_cache(maxsize=4)
def _mapped(name: str) -> npt.NDArray[Any]:
    # copy on write: compiled code takes the same type as for memory of its own, and all processes share the pages
    return np.asarray(np.load(path_of(name), mmap_mode="c"))


@lru_cache(maxsize=2)
def shared_table(hashes: SharedArray) -> RowTable:
    """The look-up table of sorted hashes; made once a process."""
    return RowTable(hashes.array)

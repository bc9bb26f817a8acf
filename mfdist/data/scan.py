"""Rows of a dataset's lanes in file order, each file checked against the manifest as it is opened. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mfdist.data.dataset import Dataset
from mfdist.data.row_groups import Columns, Counters, Limits, RatingFile
from mfdist.errors import DataError


def scan(
    dataset: Dataset, split: str, lanes: range, *, stop_fraction: float = 0.0, seed: int = 0, chunk_rows: int = 1 << 20
) -> Iterator[tuple[int, Any, Any, npt.NDArray[np.float32], npt.NDArray[np.int64] | None]]:
    """(lane, user, item, rating, timestamp or None) of the rows of ``lanes`` in file order, ``chunk_rows`` at most.

    ``split``: "train" (without the stop rows of ``stop_fraction`` and ``seed``), "stop" (those alone) or "val".
    """
    assert split in ("train", "stop", "val")
    counters = Counters()
    for lane in lanes:
        for file in open_lane(dataset, "val" if split == "val" else "train", lane, counters):
            for unit in file.units:
                columns = file.read(unit, timestamp=True)
                if split == "stop" or (split == "train" and stop_fraction):
                    from mfdist.data.batch_blocks import select

                    chosen = select(columns, seed, stop_fraction, stop=split == "stop")
                    columns = Columns(*(None if column is None else column[chosen] for column in columns))  # type: ignore[arg-type]
                for start in range(0, len(columns.user), chunk_rows):
                    part = slice(start, start + chunk_rows)
                    timestamp = None if columns.timestamp is None else columns.timestamp[part]
                    yield lane, columns.user[part], columns.item[part], columns.rating[part], timestamp


def open_lane(dataset: Dataset, split: str, lane: int, counters: Counters) -> list[RatingFile]:
    """The files of a lane, footers read and checked against the manifest; DataError names the first fault."""
    manifest = dataset.manifest
    ranges = manifest.lanes[lane].user_ranges
    limits = Limits(
        first_user=min((first for first, end in ranges if end > first), default=0),
        end_user=max((end for first, end in ranges if end > first), default=0),
        num_items=manifest.num_items, user_dtype=id_dtype(manifest.num_users), item_dtype=id_dtype(manifest.num_items),
    )  # fmt: skip
    files = []
    for entry in dataset.lane_files(split, lane):
        file = RatingFile(dataset.file_path(entry), entry.bytes, limits, counters)
        if file.metadata.num_rows != entry.rows:
            raise DataError(
                f"{file.name} has {file.metadata.num_rows} rows, the manifest says {entry.rows}: it was changed since "
                "it was prepared; run prepare --verify, or prepare it again."
            )
        files.append(file)
    return files


def id_dtype(count: int) -> Any:
    """The type of row numbers below ``count``: int32 where they fit."""
    return np.int32 if count <= np.iinfo(np.int32).max else np.int64

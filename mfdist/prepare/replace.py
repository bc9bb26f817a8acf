"""Changing a dataset without a moment in which it is damaged.

Old files are never written over. What replaces them waits beside them as NAME.next; when all of it is there
``dataset.json.next`` is written, and from then on a job that was killed is finished by the next one.
"""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, FileEntry, Manifest
from mfdist.prepare.spill import Arrays

NEXT = ".next"
REPLACED = ("users.parquet", "items.parquet", "rejected.parquet")


def open_finished(root: str) -> Dataset:
    """Open a dataset to change it, after finishing or clearing away what a killed job has left."""
    pending = storage.join(root, MANIFEST + NEXT)
    if storage.exists(pending):
        roll_forward(root)
    dataset = Dataset.open(root)
    for name in REPLACED:
        storage.remove(storage.join(root, name + NEXT))
    return dataset


def roll_forward(root: str) -> None:
    """Put what waits as NAME.next in its place, the manifest last."""
    text = storage.read_text(storage.join(root, MANIFEST + NEXT))
    for name in REPLACED:
        waiting = storage.join(root, name + NEXT)
        if storage.exists(waiting):
            fs, inner = storage.filesystem(waiting)
            fs.mv(inner, inner.removesuffix(NEXT))
    storage.write_text(storage.join(root, MANIFEST), text)
    storage.remove(storage.join(root, MANIFEST + NEXT))


def commit(root: str, manifest: Manifest) -> Dataset:
    """Make ``manifest`` the dataset's; every file it names is there, some as NAME.next."""
    storage.write_text(storage.join(root, MANIFEST + NEXT), manifest.to_json())
    roll_forward(root)
    return Dataset.open(root)


def ordered_files(manifest: Manifest) -> list[FileEntry]:
    """The lanes' files in lane order."""
    entries = {entry.path: entry for entry in manifest.files}
    return [entries[name] for lane in manifest.lanes for name in lane.files]


def read_rows(root: str, entry: FileEntry, manifest: Manifest) -> Arrays:
    """One lane file as columns 'user', 'item' (int64), 'rating' and maybe 'time'."""
    fs, inner = storage.arrow_filesystem(storage.inside(root, entry.path))
    with pq.ParquetFile(inner, filesystem=fs) as file:
        table = file.read()
    rows = {name: table.column(name).to_numpy() for name in ("user", "item", "rating")}
    rows = {name: values.astype(np.int64) if name != "rating" else values for name, values in rows.items()}
    return {**rows, "time": table.column("timestamp").to_numpy()} if manifest.has_timestamp else rows

"""``--compact``: the files that appends have left become one a lane and split."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace

import numpy as np

from mfdist import storage
from mfdist.data.dataset import Dataset, fingerprint
from mfdist.log import Console
from mfdist.prepare.append import lane_writer
from mfdist.prepare.count_pass import check_memory
from mfdist.prepare.lanes import BLOCK_ROWS
from mfdist.prepare.replace import REPLACED, commit, open_finished, ordered_files, read_rows
from mfdist.prepare.spill import Arrays
from mfdist.prepare.split import fates, occurrences


def compact(root: str, memory: int, console: Console) -> Dataset:
    """Merge each lane's files into one a split, in one random order; ids keep their rows, and no rating changes."""
    dataset = open_finished(root)
    manifest = dataset.manifest
    if not any("append-" in name for lane in manifest.lanes for name in lane.files):
        console.info(f"{storage.redact(root)} has no appended files")
        return dataset
    check_memory(max(x.train_rows + x.val_rows for x in manifest.lanes), memory, "a lane", "--memory")
    number = manifest.extra.get("compactions", 0) + 1
    scratch = tempfile.mkdtemp(prefix="mfdist-compact-")
    try:
        writer = lane_writer(manifest.order, manifest, root, scratch, f".compact-{number:03d}", manifest.num_users)
        lanes, files = [], []
        with console.progress("compact", sum(manifest.num_ratings.values())) as progress:
            for place, lane in enumerate(manifest.lanes):
                rows = lane_rows(dataset, place)
                entries = writer.write(place, [rows])[1] if rows["user"].size else []
                files += entries
                lanes.append(replace(lane, files=tuple(entry.path for entry in entries)))
                progress.advance(rows["user"].size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    others = [entry for entry in manifest.files if entry.path in REPLACED]
    val = fingerprint([e.checksum for e in files if e.path.startswith("val/")])
    extra = {**manifest.extra, "compactions": number, "block_rows": BLOCK_ROWS}
    result = commit(root, replace(manifest, lanes=tuple(lanes), files=(*files, *others),
                                  fingerprint=fingerprint([e.checksum for e in files]),
                                  split={**manifest.split, "fingerprint": val},
                                  extra=extra))  # fmt: skip
    for entry in ordered_files(manifest):
        storage.remove(dataset.file_path(entry))
    console.info(f"{storage.redact(root)}: {len(manifest.files) - 3} lane files became {len(files)}")
    return result


def lane_rows(dataset: Dataset, lane: int) -> Arrays:
    """All rows of a lane, sorted by user, with the keys of an order of its own."""
    parts = []
    for split in ("train", "val"):
        for entry in dataset.lane_files(split, lane):
            rows = read_rows(dataset.path, entry, dataset.manifest)
            parts.append({**rows, "is_val": np.full(entry.rows, split == "val")})
    if not parts:
        return {"user": np.zeros(0, np.int64)}
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keys = (rows["rating"], *((rows["time"],) if "time" in rows else ()), rows["item"], rows["is_val"], rows["user"])
    order = np.lexsort(keys)
    rows = {name: values[order] for name, values in rows.items()}
    user, item = rows["user"].astype(np.uint64), rows["item"].astype(np.uint64)
    chance, key = np.empty(user.size, np.uint64), np.empty(user.size, np.uint64)
    seed = np.uint64(dataset.manifest.split["seed"] % 2**64)
    fates(user, item, occurrences(user, rows["is_val"], item), seed, chance, key)
    return {**rows, "key": key}

"""What a manifest must be beyond the types of its values: one that comes from anywhere is believed only after this."""

from __future__ import annotations

import math
from typing import Any

from mfdist import storage
from mfdist.json_tables import typed

Manifest = Any
"""``data.dataset.Manifest``, which stands on this module."""
SPLIT = {
    "kind": str | None,
    "fraction": float | None,
    "seed": int | None,
    "last": int | None,
    "fingerprint": str | None,
}
"""What the split of a dataset says, as far as it is used."""
VOCABULARIES = ("users.parquet", "items.parquet")


def check(manifest: Manifest) -> None:
    """ValueError names the first thing that cannot be: paths, counts, ranges, files that no lane has."""
    counts = {"num_users": manifest.num_users, "num_items": manifest.num_items, "filtered": manifest.filtered,
              "merged": manifest.merged, **manifest.num_ratings, **manifest.rejected}  # fmt: skip
    for name, count in counts.items():
        _must(count >= 0, f"{name} is {count}")
    _must(set(manifest.num_ratings) == {"train", "val"}, "num_ratings is not of train and val")
    low, high = manifest.rating_scale
    figures = (low, high, manifest.rating_step, manifest.rating_skewness, manifest.rating_spread or 0.0)
    _must(all(map(math.isfinite, figures)) and low <= high, "its rating scale is no range of numbers")
    _must(manifest.rating_step >= 0 and (manifest.rating_spread or 0) >= 0, "a spread or step is below 0")
    for name, kind in SPLIT.items():
        typed(kind, manifest.split.get(name), f"split.{name}")
    for name in ("block_rows", "appends", "compactions", "time_unit"):
        _must(typed(int, manifest.extra.get(name, 0), f"extra.{name}") >= 0, f"extra.{name} is below 0")
    _must(not manifest.num_ratings["train"] or math.isfinite(manifest.global_mean), "global_mean is no number")
    _check_files(manifest)
    _check_lanes(manifest)
    _check_users(manifest)


def _check_files(manifest: Manifest) -> None:
    paths = [entry.path for entry in manifest.files]
    for entry in manifest.files:
        storage.check_relative(entry.path)
        _must(entry.rows >= 0 and entry.bytes >= 0, f"{entry.path} has {entry.rows} rows, {entry.bytes} bytes")
    _must(len(set(paths)) == len(paths), "a file stands in it twice")
    rows = {entry.path: entry.rows for entry in manifest.files}
    for name, count in zip(VOCABULARIES, (manifest.num_users, manifest.num_items), strict=True):
        _must(rows.get(name, count) == count, f"{name} has {rows.get(name)} rows for {count}")


def _check_lanes(manifest: Manifest) -> None:
    entries = {entry.path: entry for entry in manifest.files}
    named = [name for lane in manifest.lanes for name in lane.files]
    _must(len(manifest.lanes) > 0 or not any(manifest.num_ratings.values()), "it has ratings and no lane")
    _must(len(set(named)) == len(named), "two lanes have the same file")
    for name in named:
        _must(name in entries, f"a lane names {name}, which is not among its files")
        _must(name.startswith(("train/", "val/")), f"a lane names {name}, which is in neither train/ nor val/")
    in_splits = {path for path in entries if path.startswith(("train/", "val/"))}
    _must(in_splits == set(named), "a file of ratings belongs to no lane")
    for number, lane in enumerate(manifest.lanes):
        for split, rows in (("train", lane.train_rows), ("val", lane.val_rows)):
            found = sum(entries[name].rows for name in lane.files if name.startswith(f"{split}/"))
            _must(rows == found, f"lane {number} has {rows} {split} rows, its files {found}")
    for split, rows in manifest.num_ratings.items():
        found = sum(lane.train_rows if split == "train" else lane.val_rows for lane in manifest.lanes)
        _must(rows == found, f"it has {rows} {split} ratings, its lanes {found}")


def _check_users(manifest: Manifest) -> None:
    """Every user row in one lane."""
    ranges = sorted(each for lane in manifest.lanes for each in lane.user_ranges)
    end = 0
    for first, after in ranges:
        _must(end == first <= after, f"users {first} to {after} of a lane do not follow user {end} of another")
        end = after
    _must(end == manifest.num_users or not ranges, f"its lanes have {end} users, it says {manifest.num_users}")


def _must(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)

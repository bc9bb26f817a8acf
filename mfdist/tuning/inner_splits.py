"""Inner splits: datasets made of the training rows of another, some held out for the search to see its error on.

The validation rows of the dataset itself are never opened. What is held out is like them, as far as its manifest says
how they were chosen:

    random, given    the same share of the training rows, by a seed
    time             the latest share of them; the second split leaves these out and takes the latest of the rest, ...
    last-n           the last n of each user; the second split leaves these out and takes the n before, ...

Users, items and lanes are those of the dataset; ``ratings`` in users.parquet and items.parquet count what an inner
split trains on. Each split is a dataset directory of its own, that every job can open.

Example: of 1,000 training ratings and ``--val-fraction 0.2``, an inner split trains on about 800 and holds out 200.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, FileEntry, Lane, Manifest, fingerprint
from mfdist.data.scan import scan
from mfdist.errors import DataError
from mfdist.log import Console, Progress
from mfdist.prepare.lanes import LaneFacts, ParquetFile, rating_schema, row_group_rows
from mfdist.prepare.split import time_bins, time_cut
from mfdist.prepare.vocabulary import vocabulary_file
from mfdist.prepare.write_pass import rating_facts

TRAIN, HELD, DROPPED = 0, 1, 2
LEAST_SHARE, LARGEST_SHARE = 0.05, 0.3
"""Of the training rows that are held out where validation rows were given, whatever their number."""
VOCABULARY_ROWS = 1 << 20
KEPT = ("block_rows", "time_unit", "synthetic", "id_rule")
"""Of the dataset's own ``extra``, what is true of a split as well."""
IDENTITY = "inner_split"
"""Key of the manifest's ``extra`` that says what a split was made of."""

Arrays = Mapping[str, npt.NDArray[Any]]
Fates = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which training rows split ``number`` (from 1) holds out. ``cuts``: of kind time, the latest time that is left,
    and the latest that trains."""

    kind: str
    number: int
    seed: int
    fraction: float = 0.0
    last: int = 0
    cuts: tuple[int, int] = (0, 0)

    def fates(self, lane: int, rows: Arrays) -> Fates:
        """TRAIN, HELD or DROPPED of all rows of a lane (user, item, rating[, timestamp]), given in file order."""
        size = len(rows["user"])
        if self.kind == "time":
            time = rows["timestamp"]
            return np.where(time > self.cuts[0], DROPPED, np.where(time > self.cuts[1], HELD, TRAIN)).astype(np.int8)
        if self.kind == "last-n":
            return self._last_of_each(rows["user"], rows["timestamp"])
        chance = np.random.default_rng([self.seed, self.number, lane]).random(size)
        return (chance < self.fraction).astype(np.int8)

    def _last_of_each(self, user: npt.NDArray[Any], time: npt.NDArray[np.int64]) -> Fates:
        """Equal times in file order, which is random; the oldest row of a user always trains."""
        order = np.lexsort((np.arange(len(user)), time, user))
        _, first, count = np.unique(user[order], return_index=True, return_counts=True)
        place = np.arange(len(user)) - np.repeat(first, count)
        from_end = np.repeat(count, count) - 1 - place
        held = from_end // max(self.last, 1)
        fates = np.where(held < self.number - 1, DROPPED, np.where(held == self.number - 1, HELD, TRAIN))
        found = np.zeros(len(user), np.int8)
        found[order] = np.where(place == 0, TRAIN, fates)
        return found


def inner_splits(
    dataset: Dataset, folder: str, count: int, seed: int, console: Console, look: Callable[[], None] = lambda: None
) -> list[Dataset]:
    """Splits 1 to ``count`` under ``folder``: made, or found there as they would be made.

    ``look`` is called after each lane, and may raise what ends the job: an unfinished split is made anew.
    DataError where a split has nothing to train on, or nothing held out.
    """
    rules = rules_of(dataset, count, seed)
    found = []
    for rule in rules:
        path = storage.join(folder, str(rule.number))
        if (split := _already(path, dataset, rule)) is None:
            label = f"inner split {rule.number}/{count}"
            with console.progress(label, dataset.manifest.num_ratings["train"]) as progress:
                split = _make(dataset, path, rule, progress, look)
        found.append(split)
    return found


def rules_of(dataset: Dataset, count: int, seed: int) -> list[Rule]:
    """The rules of splits 1 to ``count``, after the split of the dataset itself."""
    manifest = dataset.manifest
    kind, fraction = str(manifest.split.get("kind")), float(manifest.split.get("fraction") or 0.0)
    numbers = range(1, count + 1)
    if kind == "time" and manifest.has_timestamp and 0 < fraction < 1:
        cuts = _time_cuts(dataset, fraction, count)
        return [Rule(kind=kind, number=k, seed=seed, cuts=(cuts[k - 1], cuts[k])) for k in numbers]
    if kind == "last-n" and manifest.has_timestamp:
        last = int(manifest.split.get("last") or 1)
        return [Rule(kind=kind, number=k, seed=seed, last=last) for k in numbers]
    if kind != "random" or not 0 < fraction < 1:
        rows = manifest.num_ratings
        fraction = min(max(rows["val"] / max(sum(rows.values()), 1), LEAST_SHARE), LARGEST_SHARE)
    return [Rule(kind="random", number=k, seed=seed, fraction=fraction) for k in numbers]


def _time_cuts(dataset: Dataset, fraction: float, count: int) -> list[int]:
    """The latest time, and then again and again the time that at most ``fraction`` of the rows up to it are later than;
    cut k is the end of what split k trains on, cut k - 1 of what it holds out."""
    lanes = range(len(dataset.manifest.lanes))

    def times() -> Any:
        for _, _, _, _, time in scan(dataset, "train", lanes):
            if time is None:
                raise DataError(f"{storage.redact(dataset.path)} is split by time, and a file of it has no timestamps.")
            yield {"time": time}

    def counted(first: int, last: int, width: int) -> npt.NDArray[np.int64]:
        counts = np.zeros((last - first) // width + 1, np.int64)
        for part in times():
            counts += time_bins(part, first, last, width)
        return counts

    ends = [(int(part["time"].min()), int(part["time"].max())) for part in times() if len(part["time"])]
    low, cuts = min(end[0] for end in ends), [max(end[1] for end in ends)]
    for _ in range(count):
        cuts.append(time_cut(counted, low, cuts[-1], fraction))
    return cuts


def _identity(dataset: Dataset, rule: Rule) -> dict[str, Any]:
    return {"of": dataset.manifest.fingerprint, **asdict(rule), "cuts": list(rule.cuts)}


def _already(path: str, dataset: Dataset, rule: Rule) -> Dataset | None:
    if not storage.exists(storage.join(path, MANIFEST)):
        return None
    found = Dataset.open(path)
    if found.manifest.extra.get(IDENTITY) != _identity(dataset, rule):
        return None
    try:
        found.check_files()
    except DataError:  # a kill while it was being removed
        return None
    return found


def _make(dataset: Dataset, path: str, rule: Rule, progress: Progress, look: Callable[[], None]) -> Dataset:
    """Write the split, its manifest last."""
    storage.remove(path)
    storage.make_dirs(path)
    manifest = dataset.manifest
    counts = {"user": np.zeros(manifest.num_users, np.int64), "item": np.zeros(manifest.num_items, np.int64)}
    facts, lanes, files = LaneFacts(), list[Lane](), list[FileEntry]()
    with tempfile.TemporaryDirectory(prefix="mfdist-tune-") as scratch:
        for number, lane in enumerate(manifest.lanes):
            rows = _rows_of_lane(dataset, number)
            fates = rule.fates(number, rows)
            entries = []
            for split, fate in (("train", TRAIN), ("val", HELD)):
                chosen = {name: column[fates == fate] for name, column in rows.items()}
                _count(facts, split, chosen["rating"])
                if split == "train":
                    for side, total in counts.items():
                        np.add(total, np.bincount(chosen[side], minlength=len(total)), out=total)
                if len(chosen["user"]):
                    entries.append(_write_lane(path, f"{split}/lane-{number:05d}.parquet", chosen, manifest, scratch))
            held = [sum(e.rows for e in entries if e.path.startswith(f"{split}/")) for split in ("train", "val")]
            lanes.append(replace(lane, train_rows=held[0], val_rows=held[1], files=tuple(e.path for e in entries)))
            files += entries
            progress.advance(len(fates))
            look()
        others = [_write_vocabulary(dataset, path, f"{side}s", total, scratch) for side, total in counts.items()]
    made = _manifest(dataset, rule, tuple(lanes), files, others, facts)
    if not all(made.num_ratings.values()):
        what = "training" if not made.num_ratings["train"] else "held-out"
        raise DataError(
            f"inner split {rule.number} of {storage.redact(dataset.path)} has no {what} ratings: give fewer "
            "--splits, or take a larger dataset."
        )
    storage.write_text(storage.join(path, MANIFEST), made.to_json())
    return Dataset(path, made)


def _rows_of_lane(dataset: Dataset, lane: int) -> Arrays:
    """The training rows of a lane by column: user, item, rating[, timestamp]."""
    names = ("user", "item", "rating", "timestamp")
    parts = [chunk[1:] for chunk in scan(dataset, "train", range(lane, lane + 1))]
    if not parts:
        kinds = (np.int64, np.int64, np.float32, np.int64)
        return {name: np.empty(0, kind) for name, kind in zip(names, kinds, strict=True)}
    columns = dict(zip(names, zip(*parts, strict=True), strict=True))
    return {name: np.concatenate(pieces) for name, pieces in columns.items() if pieces[0] is not None}


def _count(facts: LaneFacts, split: str, ratings: npt.NDArray[np.float32]) -> None:
    values, counts = np.unique(ratings, return_counts=True)
    table = dict(zip(values.tolist(), counts.tolist(), strict=True))
    facts.add(LaneFacts(train_values=table) if split == "train" else LaneFacts(val_values=table))


def _write_lane(path: str, name: str, rows: Arrays, manifest: Manifest, scratch: str) -> FileEntry:
    wide = max(manifest.num_users, manifest.num_items) > np.iinfo(np.int32).max
    schema = rating_schema(pa.int64() if wide else pa.int32(), "timestamp" in rows)
    table = pa.table({column: pa.array(values) for column, values in rows.items()}).cast(schema)
    with ParquetFile(path, name, schema, scratch, use_dictionary=["rating"], write_statistics=True) as file:
        file.write(table, row_group_rows(len(manifest.lanes)))
    return file.done


def _write_vocabulary(
    dataset: Dataset, path: str, side: str, ratings: npt.NDArray[np.int64], scratch: str
) -> FileEntry:
    """users.parquet or items.parquet of ``dataset`` with other numbers of ratings."""
    with vocabulary_file(path, side, scratch) as vocabulary:
        for first in range(0, len(ratings), VOCABULARY_ROWS):
            end = min(first + VOCABULARY_ROWS, len(ratings))
            for chunk in dataset.ids(side, first, end).chunks:
                vocabulary.write_texts(chunk, ratings[first : first + len(chunk)])
                first += len(chunk)  # noqa: PLW2901
        vocabulary.flush()
    return vocabulary.file.done


def _manifest(
    dataset: Dataset, rule: Rule, lanes: tuple[Lane, ...], files: list[FileEntry], others: list[FileEntry],
    facts: LaneFacts,
) -> Manifest:  # fmt: skip
    outer = dataset.manifest
    kept: dict[str, Any] = {key: outer.extra[key] for key in KEPT if key in outer.extra}
    ratings = {"train": sum(lane.train_rows for lane in lanes), "val": sum(lane.val_rows for lane in lanes)}
    about = {"rating_scale": outer.rating_scale, "rating_step": outer.rating_step}
    found = {**rating_facts(facts, outer.rating_scale), **about} if all(ratings.values()) else about
    return replace(
        outer, name=f"{outer.name}, inner split {rule.number}", num_ratings=ratings, lanes=lanes,
        split={"kind": rule.kind, "fraction": rule.fraction, "seed": rule.seed,
               "fingerprint": fingerprint([e.checksum for e in files if e.path.startswith("val/")])},
        fingerprint=fingerprint([e.checksum for e in files]), sources=[], rejected={}, filtered=0, merged=0,
        files=(*files, *others), extra={**kept, IDENTITY: _identity(dataset, rule)}, **found,
    )  # fmt: skip

"""Files of ratings for prepare, and what a dataset holds, for tests."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mfdist.config import parse_config
from mfdist.data.dataset import Dataset, verify
from mfdist.log import Console
from mfdist.prepare.prepare import PrepareConfig, prepare

Row = tuple[Any, ...]


@pytest.fixture(autouse=True)
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests draw no figures: they would take most of the time. The real pieces do."""
    from mfdist.prepare import append, write_pass

    if "real" not in request.node.name:
        for module in (append, write_pass):
            monkeypatch.setattr(module, "write_dataset_report", lambda *_: None)


def run(*argv: Any) -> Dataset:
    return prepare(parse_config(PrepareConfig, [str(a) for a in argv], "test"), Console())


def rows_of(dataset: Dataset, split: str | None = None) -> list[Row]:
    """(user id, item id, rating[, time]) of every row."""
    users, items = (dataset.ids(side).to_pylist() for side in ("users", "items"))
    found = []
    for entry in dataset.manifest.files:
        folder = entry.path.split("/")[0]
        if folder in ("train", "val") and split in (None, folder):
            table = pq.read_table(dataset.file_path(entry))
            assert table.num_rows == entry.rows and all(column.null_count == 0 for column in table.columns)
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                found.append((users[row[0]], items[row[1]], *row[2:]))
    return sorted(found)


def files_of(dataset: Dataset) -> dict[str, str]:
    return {entry.path: entry.checksum for entry in dataset.manifest.files if not entry.path.startswith("rejected")}


def sample(n: int = 2000, users: int = 200, items: int = 60, seed: int = 0, repeats: bool = False) -> list[Row]:
    rng = random.Random(seed)
    pairs = [(u, i) for u in range(users) for i in range(items)]
    chosen = [rng.choice(pairs) for _ in range(n)] if repeats else rng.sample(pairs, n)
    return [(f"u{u:03d}", f"i{i}", float(rng.randint(1, 5)), rng.randint(10**9, 10**9 + 10**6)) for u, i in chosen]


def write_csv(path: Path, rows: list[Row], sep: str = ",", header: str = "", end: str = "\n") -> Path:
    path.write_text((header + end if header else "") + "".join(sep.join(map(str, r)) + end for r in rows), newline="")
    return path


def check_whole(dataset: Dataset) -> None:
    """The directory is what its manifest and the contract say."""
    m = dataset.manifest
    assert list(verify(dataset)) == []
    covered = sorted(r for lane in m.lanes for r in lane.user_ranges)
    assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])][: len(covered)]
    assert not covered or covered[-1][1] == m.num_users
    train = Counter(r[0] for r in rows_of(dataset, "train"))
    assert [train[u] for u in dataset.ids("users").to_pylist()] == dataset.counts("users").tolist()
    items = Counter(r[1] for r in rows_of(dataset, "train"))
    assert [items[i] for i in dataset.ids("items").to_pylist()] == dataset.counts("items").tolist()
    for number, lane in enumerate(m.lanes):
        for split, expected in (("train", lane.train_rows), ("val", lane.val_rows)):
            total = 0
            for entry in dataset.lane_files(split, number):
                user = pq.read_table(dataset.file_path(entry)).column("user").to_numpy()
                assert all(any(a <= u < b for a, b in lane.user_ranges) for u in user)
                total += user.size
            assert total == expected
    rejected = pq.read_table(os.path.join(dataset.path, "rejected.parquet"))
    assert Counter(rejected.column("reason").to_pylist()) == Counter(m.rejected)
    rows_in = sum(s["rows"] for s in m.sources)
    assert rows_in == sum(m.num_ratings.values()) + rejected.num_rows + m.filtered + m.merged

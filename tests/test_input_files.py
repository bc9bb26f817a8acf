"""The same rows under two names, in two places, or in both splits: read once, refused, or said with their number."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.prepare import PrepareConfig, prepare


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfdist.prepare import append, write_pass

    for module in (append, write_pass):
        monkeypatch.setattr(module, "write_dataset_report", lambda *_: None)


def run(*argv: Any) -> Dataset:
    return prepare(parse_config(PrepareConfig, [str(a) for a in argv], "test"), Console())


def ratings(folder: Path, name: str = "a.csv", users: str = "u") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{users}{k % 9},i{k},{k % 5 + 1},{k}\n" for k in range(40)))
    return path


def num_rows(dataset: Dataset) -> int:
    return sum(dataset.manifest.num_ratings.values())


@pytest.mark.parametrize("kind", ["symlink", "hard link", "other path", "folder and file", "linked folder", "twice"])
def test_one_file_under_two_names_is_read_once(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ratings(tmp_path / "f")
    other: str | Path = tmp_path / "f" / "b.csv"
    if kind == "symlink":
        os.symlink(source, other)
    elif kind == "hard link":
        os.link(source, other)
    elif kind == "other path":
        other = tmp_path / "f" / ".." / "f" / "a.csv"
    elif kind == "folder and file":
        other = tmp_path / "f"
    elif kind == "linked folder":
        other = tmp_path / "g"
        os.symlink(tmp_path / "f", other)
    else:
        other = source
    dataset = run(source, other, "--out", tmp_path / "d")
    assert num_rows(dataset) == 40 and len(dataset.manifest.sources) == 1
    assert ("is the same file as" in capsys.readouterr().out) == (kind not in ("folder and file", "twice"))


def test_a_link_to_a_folder_above_ends_no_search(tmp_path: Path) -> None:
    ratings(tmp_path / "f" / "g")
    os.symlink(tmp_path / "f", tmp_path / "f" / "g" / "up")
    assert num_rows(run(tmp_path / "f", "--out", tmp_path / "d")) == 40


def test_a_file_to_train_on_is_no_val_file(tmp_path: Path) -> None:
    source = ratings(tmp_path)
    os.link(source, tmp_path / "b.csv")
    with pytest.raises(UsageError, match="given as --val"):
        run(source, "--val", tmp_path / "b.csv", "--out", tmp_path / "d")


def test_val_rows_that_are_trained_on_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    rows = [
        (f"u{rng.randrange(30)}", f"i{rng.randrange(9)}", rng.randrange(1, 3), rng.randrange(4)) for _ in range(600)
    ]
    train, val = rows[:400], rows[400:]
    for name, part in (("a.csv", train), ("b.csv", val)):
        (tmp_path / name).write_text("".join(",".join(map(str, row)) + "\n" for row in part))
    files = [tmp_path / "a.csv", "--val", tmp_path / "b.csv", "--columns", "0,1,2,3"]
    dataset = run(*files, "--out", tmp_path / "d")
    pairs = sum(row[:2] in {r[:2] for r in train} for row in val)
    same = sum(row in set(train) for row in val)
    assert dataset.manifest.extra["val_in_train"] == {"pairs": pairs, "rows": same} and 0 < same < pairs < 200
    assert f"{pairs} of 200 --val rows" in capsys.readouterr().err
    assert Counter(dataset.manifest.num_ratings) == {"train": 400, "val": 200}


def test_val_rows_of_an_append_that_are_trained_on_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On before or beside them, of known and of new users."""
    texts = {
        "a.csv": "u1,a,5,100\nu1,b,4,100\nu2,a,3,100\nu3,c,2,100\n", "b.csv": "u9,a,5,100\nu1,c,5,100\n",
        "c.csv": "u1,a,5,100\nu1,b,1,100\nu2,c,3,100\nu9,a,5,100\nu9,b,5,100\nu1,c,5,101\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in texts)
    run(a, "--out", tmp_path / "d", "--val-fraction", 0, "--lanes", 2, "--columns", "0,1,2,3")
    dataset = run(b, "--val", c, "--out", tmp_path / "d", "--append", "--columns", "0,1,2,3")
    assert dataset.manifest.extra["val_in_train"] == {"pairs": 4, "rows": 2}
    assert "4 of 6 --val rows" in capsys.readouterr().err
    assert Counter(dataset.manifest.num_ratings) == {"train": 6, "val": 6}


def test_an_append_of_known_bytes_beside_new_ones_is_refused(tmp_path: Path) -> None:
    first, second = ratings(tmp_path), ratings(tmp_path, "c.csv", "v")
    run(first, "--out", tmp_path / "d")
    os.rename(first, tmp_path / "again.csv")
    with pytest.raises(DataError, match=r"holds the rows of .*again\.csv already"):
        run(tmp_path / "again.csv", second, "--out", tmp_path / "d", "--append")
    assert num_rows(run(second, "--out", tmp_path / "d", "--append")) == 80


def test_an_append_keeps_the_datasets_unit_of_time(tmp_path: Path) -> None:
    """Datasets of earlier versions hold milliseconds where their source did."""
    import json

    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_text("u1,a,5,1577836800\nu2,b,4,1577836800\n")
    dataset = run(tmp_path / "a.csv", "--out", tmp_path / "d", "--lanes", 1, "--val-fraction", 0)
    path = tmp_path / "d" / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["extra"]["time_unit"] = 1000
    path.write_text(json.dumps(manifest))
    (tmp_path / "b.csv").write_text("u3,a,5,1577836800\n")
    (tmp_path / "c.csv").write_text("u4,a,5,1577836800123\n")
    dataset = run(tmp_path / "b.csv", tmp_path / "c.csv", "--out", tmp_path / "d", "--append")
    added = [dataset.file_path(entry) for entry in dataset.manifest.files if "append" in entry.path]
    times = [time for path in added for time in pq.read_table(path).column("timestamp").to_pylist()]
    assert times == [1577836800000, 1577836800000]


def test_a_file_in_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfdist.prepare.input_files import find_sources

    def denied(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    source = ratings(tmp_path / "f")
    monkeypatch.setattr("mfdist.prepare.input_files.storage.list_names", denied)
    assert [found.path for found in find_sources((str(source),))] == [str(source)]


def test_a_member_of_a_zip_file_by_its_url(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/one.csv", ratings(tmp_path).read_text())
        archive.writestr("m/two.csv", "")
    assert num_rows(run(f"zip://m/one.csv::{tmp_path}/x.zip", "--out", tmp_path / "d")) == 40
    with pytest.raises(DataError, match="no such file"):
        run(f"zip://m/none.csv::{tmp_path}/x.zip", "--out", tmp_path / "e")

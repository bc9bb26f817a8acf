"""Prepare: every row is in the dataset once or accounted for, whatever the format, order or damage of the input."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_files import Row, bare, check_whole, files_of, rows_of, run, sample, write_csv  # noqa: F401

from mfdist import prepare_frame
from mfdist.data.dataset import verify
from mfdist.errors import DataError, UsageError, exit_code_of
from mfdist.prepare import ids, lanes, readers

ROOT = Path(__file__).parents[1]


FORMATS = ["csv", "header", "crlf", "tsv", "dat", "gz", "bz2", "zst", "zip", "bom", "quoted", "json14", "json23",
           "parquet", "no-end"]  # fmt: skip


def write_as(kind: str, folder: Path, rows: list[Row]) -> Path:
    plain = "".join(",".join(map(str, r)) + "\n" for r in rows).encode()
    path = folder / f"ratings.{kind}"
    if kind in ("csv", "no-end", "bom"):
        path.write_bytes((b"\xef\xbb\xbf" * (kind == "bom")) + (plain.rstrip() if kind == "no-end" else plain))
    elif kind == "header":
        write_csv(path, [(r[1], r[3], r[0], r[2]) for r in rows], header="movieId,timestamp,userId,rating")
    elif kind == "crlf":
        write_csv(path, rows, end="\r\n")
    elif kind in ("tsv", "dat"):
        write_csv(path, rows, sep="\t" if kind == "tsv" else "::")
    elif kind == "gz":
        path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))  # two members
    elif kind == "bz2":
        path.write_bytes(bz2.compress(plain))
    elif kind == "zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(plain)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ml/README", "about")
            archive.writestr("ml/ratings.csv", plain)
    elif kind == "quoted":
        with open(path, "w", newline="") as out:
            csv.writer(out, quoting=csv.QUOTE_ALL).writerows(rows)
    elif kind == "json14":
        keys = ("reviewerID", "asin", "overall", "unixReviewTime")
        path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True), reviewText="a\nb")) + "\n" for r in rows))
    elif kind == "json23":
        keys = ("user_id", "parent_asin", "rating", "timestamp")
        path.write_text("".join(json.dumps(dict(zip(keys, r, strict=True), asin="X")) + "\n" for r in rows))
    else:
        pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row").write_parquet(path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_dataset(kind: str, tmp_path: Path) -> None:
    rows = sample()
    dataset = run(write_as(kind, tmp_path, rows), "--out", tmp_path / "d", "--lanes", 4)
    assert rows_of(dataset) == sorted(rows)
    check_whole(dataset)
    assert dataset.manifest.has_timestamp
    reference = run(write_as("csv", tmp_path, rows), "--out", tmp_path / "r", "--lanes", 4)
    assert files_of(dataset) == files_of(reference) and dataset.manifest.fingerprint == reference.manifest.fingerprint


@pytest.mark.parametrize("order", ["random", "blocks"])
@pytest.mark.parametrize("split", [["--split", "random"], ["--split", "last-n", "--last", "2"], ["--split", "time"]])
@pytest.mark.parametrize("duplicates", ["keep", "last", "mean"])
def test_order_files_and_chunks_do_not_matter(
    order: str, split: list[str], duplicates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(n=3000, repeats=True)
    flags = ["--lanes", "3", "--order", order, *split, "--duplicates", duplicates]
    one = run(write_csv(tmp_path / "all.csv", rows), "--out", tmp_path / "one", *flags)
    random.Random(1).shuffle(rows)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 777)
    (tmp_path / "parts").mkdir()
    for k in range(5):
        write_csv(tmp_path / "parts" / f"{k}.csv", rows[k::5])
    two = run(tmp_path / "parts", "--out", tmp_path / "two", *flags)
    assert files_of(one) == files_of(two)
    check_whole(two)


def test_spilling_gives_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(tmp_path / "all.csv", sample(n=6000, users=900))
    one = run(source, "--out", tmp_path / "one", "--lanes", 7)
    from mfdist.prepare import read_pass, write_pass
    from mfdist.prepare.spill import IdSpill, RowSpill

    monkeypatch.setattr(readers, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(read_pass, "RowSpill", lambda folder, _: RowSpill(folder, 20_000))
    monkeypatch.setattr(read_pass, "IdSpill", lambda folder, name, _: IdSpill(folder, name, 2_000))
    monkeypatch.setattr(read_pass, "SeenIds", lambda _: ids.SeenIds(64))
    monkeypatch.setattr(write_pass, "group_bounds", lambda *_: [(k, k + 64) for k in range(0, 4096, 64)])
    two = run(source, "--out", tmp_path / "two", "--lanes", 7)
    assert files_of(one) == files_of(two)


def test_splits(tmp_path: Path) -> None:
    rows = sample(n=4000)
    source = write_csv(tmp_path / "all.csv", rows)
    by_time = run(source, "--out", tmp_path / "t", "--split", "time", "--val-fraction", 0.25)
    assert max(r[3] for r in rows_of(by_time, "train")) < min(r[3] for r in rows_of(by_time, "val"))
    assert by_time.manifest.num_ratings["val"] == pytest.approx(1000, abs=2)
    last = run(source, "--out", tmp_path / "l", "--split", "last-n", "--last", 3)
    newest: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r[3]):
        newest.setdefault(row[0], []).append(row)
    times = Counter((r[0], r[3]) for r in rows_of(last, "val"))
    assert times == Counter((r[0], r[3]) for own in newest.values() for r in own[1:][-3:])
    hashed = run(source, "--out", tmp_path / "h")
    assert abs(hashed.manifest.num_ratings["val"] - 800) < 4 * np.sqrt(4000 * 0.16)
    other = run(source, "--out", tmp_path / "o", "--seed", 7)
    assert rows_of(other, "val") != rows_of(hashed, "val")
    train, val = write_csv(tmp_path / "a.csv", rows[:3000]), write_csv(tmp_path / "b.csv", rows[3000:])
    given_ = run(train, "--val", val, "--out", tmp_path / "g")
    assert rows_of(given_, "val") == sorted(rows[3000:]) and rows_of(given_, "train") == sorted(rows[:3000])
    assert given_.manifest.split["kind"] == "given"


def test_duplicates(tmp_path: Path) -> None:
    rows = [("a", "x", 1.0, 5), ("a", "x", 4.0, 7), ("a", "x", 2.0, 7), ("b", "x", 3.0, 1)]
    source = write_csv(tmp_path / "d.csv", rows)
    flags = ["--val-fraction", 0, "--overwrite", "--out", tmp_path / "d"]
    assert rows_of(run(source, *flags)) == sorted(rows)
    assert rows_of(run(source, *flags, "--duplicates", "last")) == [("a", "x", 4.0, 7), ("b", "x", 3.0, 1)]
    mean = run(source, *flags, "--duplicates", "mean")
    assert rows_of(mean) == [("a", "x", pytest.approx(7 / 3), 7), ("b", "x", 3.0, 1)] and mean.manifest.merged == 2
    with pytest.raises(DataError, match="'a' rates item 'x'"):
        run(source, *flags, "--duplicates", "error")


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_minimum_counts_are_the_core(
    tmp_path_factory: pytest.TempPathFactory, min_user: int, min_item: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("core")
    rows = sample(n=120, users=40, items=30, seed=seed)
    expected = list(rows)
    while True:
        users, items = Counter(r[0] for r in expected), Counter(r[1] for r in expected)
        kept = [r for r in expected if users[r[0]] >= min_user and items[r[1]] >= min_item]
        if len(kept) == len(expected):
            break
        expected = kept
    args = [write_csv(folder / "a.csv", rows), "--out", folder / "d", "--lanes", 2,
            "--min-user-ratings", min_user, "--min-item-ratings", min_item]  # fmt: skip
    if not expected:
        with pytest.raises(DataError, match="no row is left"):
            run(*args)
        return
    dataset = run(*args)
    assert rows_of(dataset) == sorted(expected) and dataset.manifest.filtered == 120 - len(expected)
    check_whole(dataset)


def test_bad_rows_are_kept_with_line_and_reason(tmp_path: Path) -> None:
    good = [f"u{k},i{k % 7},4,100" for k in range(300)]
    bad = {5: ("a,b,4", "wrong number of fields"), 9: ("a,b,five,1", "rating is not a number"),
           40: ("a,b,NaN,1", "rating is not finite"), 41: (",b,4,1", "empty user id"), 42: ("a, ,4,1", "empty item id"),
           50: ("a,b,9,1", "rating is outside the scale"), 51: ("a,b,4,noon", "timestamp is not a number"),
           60: ('"a,b,4,1', "quote that is not closed"), 70: ("a,b,1e39,1", "rating is not finite"),
           }  # fmt: skip
    for line, (text, _) in bad.items():
        good.insert(line - 1, text)
    (tmp_path / "r.csv").write_text("\n".join(good) + "\n")
    flags = ["--columns", "0,1,2,3", "--rating-scale", "1,5", "--max-rejected", 0.05]
    dataset = run(tmp_path / "r.csv", "--out", tmp_path / "d", *flags)
    rejected = pq.read_table(tmp_path / "d" / "rejected.parquet").to_pylist()
    found = {r["line"]: (r["text"], r["reason"]) for r in rejected}
    expected = dict(bad)
    expected[70] = ("a,b,1e39,1", "rating is outside the scale") if found[70][1] != bad[70][1] else bad[70]
    assert found == expected
    check_whole(dataset)
    with pytest.raises(DataError, match=r"9 of 309 rows are refused.*line 5: wrong number of fields"):
        run(tmp_path / "r.csv", "--out", tmp_path / "e", *flags[:-1], 0.01)
    assert not (tmp_path / "e").exists()


def test_ids_are_texts(tmp_path: Path) -> None:
    odd = ['a,"b"', "naïve ☃", "x;y", "007", "7", "line\nend"]
    with open(tmp_path / "a.csv", "w", newline="") as out:
        csv.writer(out).writerows([(u, f"item, {k}", 3, k) for k, u in enumerate(odd)])
    ints = pl.DataFrame({"user_id": [7, 8], "item_id": [1.0, None], "rating": [5, 4], "timestamp": [1, 2]})
    ints.write_parquet(tmp_path / "b.parquet")
    dataset = run(tmp_path / "a.csv", tmp_path / "b.parquet", "--out", tmp_path / "d", "--max-rejected", 0.5)
    assert sorted(dataset.ids("users").to_pylist()) == sorted(odd)  # the row of 8 has no item
    assert "1" in dataset.ids("items").to_pylist() and dataset.manifest.rejected == {"empty item id": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "is empty"), (b"\x7fELF\0\0\1" * 99, "binary"), (b"\n\n\n", "empty"),
     (b"userId,movieId,rating\n", "no rows"), (b"one\ntwo\nthree\n", "1 column"), (b"[{}]", "JSON array"),
     (b"PAR1junk", "Parquet"), (b"PK\3\4junk", "zip"), (gzip.compress(b"a,b,3\n" * 99999)[:-300], "cut off"),
     ("a,b,3\n".encode("utf-32"), "UTF-32"), (b"{]\n{]\n", "lines of JSON")],
)  # fmt: skip
def test_wrong_files_end_with_a_sentence(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "x.csv").write_bytes(content)
    code = exit_code_of(lambda: run(tmp_path / "x.csv", "--out", tmp_path / "d") and 0)
    error = capsys.readouterr().err
    assert code == 3 and words in error and "Traceback" not in error
    assert not (tmp_path / "d").exists()


def test_item_first_amazon_ratings_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"00017{k:05d}", f"A1C2VKKDCP5H{k:02d}", 5.0, 1414800000 + k) for k in range(20)]
    dataset = run(write_csv(tmp_path / "Books.csv", rows), "--out", tmp_path / "d")
    assert "Amazon 2018" in capsys.readouterr().out
    assert all(user.startswith("A1C2") for user in dataset.ids("users").to_pylist())


def test_the_same_command_again_and_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_csv(tmp_path / "a.csv", sample())
    first = run(source, "--out", tmp_path / "d")
    stamp = (tmp_path / "d" / "dataset.json").stat().st_mtime_ns
    run(source, "--out", tmp_path / "d")
    assert "prepared already" in capsys.readouterr().out
    assert (tmp_path / "d" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="--overwrite"):
        run(source, "--out", tmp_path / "d", "--seed", 1)
    (tmp_path / "bad.csv").write_bytes(b"")
    with pytest.raises(DataError):
        run(tmp_path / "bad.csv", "--out", tmp_path / "d", "--overwrite")
    assert list(verify(first)) == []
    run(source, "--out", tmp_path / "d", "--seed", 1, "--overwrite")


@pytest.mark.parametrize("name", ["notes.txt", "train/photo.jpg", "report/thesis.pdf"])
def test_other_files_are_never_removed(name: str, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", sample())
    kept = tmp_path / "d" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        run(source, "--out", tmp_path / "d", "--overwrite")
    assert kept.read_text() == "mine"


def test_verify_names_the_damage(tmp_path: Path) -> None:
    dataset = run(write_csv(tmp_path / "a.csv", sample()), "--out", tmp_path / "d", "--lanes", 2)
    run("--verify", tmp_path / "d")
    path = tmp_path / "d" / "train" / "lane-00001.parquet"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"lane-00001.parquet has another checksum"):
        run("--verify", dataset.path)


def test_collisions_are_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sample()
    true_hash = readers.hash_ids

    def clash(content: Any, start: Any, length: Any, salt: Any, first: Any, second: Any) -> None:
        true_hash(content, start, length, salt, first, second)
        if salt == 0:
            first &= np.uint64(0xFF << 56)

    monkeypatch.setattr(readers, "hash_ids", clash)
    dataset = run(write_csv(tmp_path / "a.csv", rows), "--out", tmp_path / "d")
    assert dataset.manifest.extra["salt"] == 1 and rows_of(dataset) == sorted(rows)


def test_wide_rows_and_tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sample(n=50, users=10, items=9)
    tiny = run(write_csv(tmp_path / "a.csv", rows), "--out", tmp_path / "d")
    check_whole(tiny)
    assert len(tiny.manifest.lanes) == 64 and rows_of(tiny) == sorted(rows)
    from mfdist.prepare import count_pass

    monkeypatch.setattr(count_pass, "INT32_ROWS", 5)
    wide = run(tmp_path / "a.csv", "--out", tmp_path / "w", "--lanes", 2)
    assert pq.read_schema(tmp_path / "w" / "train" / "lane-00000.parquet").field("user").type == pa.int64()
    assert rows_of(wide) == sorted(rows)


@pytest.mark.parametrize("make", [pl.DataFrame, pd.DataFrame])
def test_frames(make: Any, tmp_path: Path) -> None:
    rows = sample()
    columns = dict(zip(("user_id", "item_id", "rating", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    dataset = prepare_frame(make(columns), tmp_path / "d", lanes=2)
    assert rows_of(dataset) == sorted(rows)
    check_whole(dataset)


def real(name: str) -> Path:
    folder = os.environ.get("MFDIST_TEST_DATA")
    if not folder:
        pytest.skip("MFDIST_TEST_DATA is not set: the real ratings are not here")
    return Path(folder) / name


@pytest.mark.parametrize(
    ("name", "rows", "users", "items"),
    [("ratings_Electronics.head50698.csv", 50698, 47141, 3529), ("electronics-core164k.parquet", 164007, 8014, 6727),
     ("ml-1m.parquet", 1000209, 6040, 3706), ("ml-100k.tsv", 100000, 943, 1682)],
)  # fmt: skip
def test_real_pieces(name: str, rows: int, users: int, items: int, tmp_path: Path) -> None:
    m = run(real(name), "--out", tmp_path / "d").manifest
    assert (sum(m.num_ratings.values()), m.num_users, m.num_items) == (rows, users, items)
    assert m.rating_scale == (1, 5) and m.rating_step == 1 and sum(c for _, c in m.rating_histogram) == rows
    assert {p.name for p in (tmp_path / "d" / "report").iterdir()} >= {"ratings.png", "index.html"}


@pytest.mark.parametrize("layout", ["csv", "dat", "data"])
def test_movielens_in_its_three_layouts(layout: str, tmp_path: Path) -> None:
    rows = [line.split("\t") for line in real("ml-100k.tsv").read_text().splitlines()]
    sep, header = {"csv": (",", "userId,movieId,rating,timestamp"), "dat": ("::", ""), "data": ("\t", "")}[layout]
    m = run(write_csv(tmp_path / f"ratings.{layout}", rows, sep, header), "--out", tmp_path / "d").manifest
    assert (sum(m.num_ratings.values()), m.num_users, m.num_items) == (100_000, 943, 1_682)


def test_blocks_are_of_neighbouring_users_and_begin_where_a_reader_cuts() -> None:
    rng = np.random.default_rng(0)
    size, block = 1000, lanes.BLOCK_ROWS
    rows = {"user": np.sort(rng.integers(0, 400, size)), "key": rng.integers(0, 2**64, size, np.uint64)}
    order = lanes.lane_order(rows, "blocks", 0)
    blocks = [order[first : first + block] for first in range(0, size, block)]
    begins = [int(part.min()) for part in blocks]
    for begin, part in zip(begins, blocks, strict=True):
        assert sorted(part) == list(range(begin, begin + len(part))) and list(part) != sorted(part)
    assert sorted(begins) == list(range(0, size, block))
    assert begins != sorted(begins)
    assert begins[-1] == size - size % block


@pytest.mark.parametrize("order", ["random", "blocks"])
def test_lanes_are_even_and_every_row_group_is_a_fair_sample(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is sorted by item and time; neither may show in the lanes, their row groups, or the user rows."""
    monkeypatch.setattr(lanes, "row_group_rows", lambda num_lanes: 1500)
    rng = np.random.default_rng(0)
    n = 60_000
    user, item = rng.integers(0, 20_000, n), np.sort(rng.integers(0, 2000, n))
    frame = pl.DataFrame({"user_id": user, "item_id": item, "rating": rng.integers(1, 6, n), "timestamp": np.arange(n)})
    dataset = prepare_frame(frame, tmp_path / "d", lanes=4, order=order)
    sizes = [lane.train_rows + lane.val_rows for lane in dataset.manifest.lanes]
    assert max(abs(s / np.mean(sizes) - 1) for s in sizes) < 0.02
    source_place = np.array([int(i) for i in dataset.ids("items").to_pylist()])
    groups = 0
    for lane in range(4):
        (entry,) = dataset.lane_files("train", lane)
        with pq.ParquetFile(dataset.file_path(entry)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                facts = {
                    "item": source_place[table.column("item").to_numpy()] / 2000,
                    "time": table.column("timestamp").to_numpy() / n,
                    "rating": (table.column("rating").to_numpy() - 0.5) / 5,
                }
                place = np.linspace(-1, 1, table.num_rows)
                noise = np.sqrt(1 / 12 / table.num_rows)  # of the mean of so many uniform numbers
                for name, values in facts.items():
                    where = f"lane {lane}, row group {group}: {name}"
                    assert abs(values.mean() - 0.5) < 4.5 * noise, f"{where} is not that of the whole"
                    follows = np.corrcoef(place, values)[0, 1]
                    assert abs(follows) < 4.5 / np.sqrt(table.num_rows), f"{where} follows the order"
                groups += 1
    assert groups >= 4 * 8
    rows = np.array([int(u) for u in dataset.ids("users").to_pylist()])
    first_seen = {u: k for k, u in reversed(list(enumerate(user.tolist())))}
    seen = np.array([first_seen[u] for u in rows])
    assert abs(np.corrcoef(np.arange(seen.size), seen)[0, 1]) < 4 / np.sqrt(seen.size)

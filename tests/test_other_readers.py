"""Prepare reads well-formed files as DuckDB, polars and scipy do."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from read_sources import KEYS, Row, read

from mfdist.prepare import readers


def test_scipy_writes_what_is_read(tmp_path: Path) -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    from scipy.io import mmwrite

    rng = np.random.default_rng(0)
    matrix = scipy_sparse.random_array((90, 70), density=0.1, rng=rng, format="coo")
    for values in (matrix, (matrix * 9e6).astype(np.int64).tocoo(), (matrix * 1e-9).tocoo()):
        mmwrite(tmp_path / "r.mtx", values)
        found = read(tmp_path / "r.mtx")
        rows = [(str(r + 1), str(c + 1), np.float32(v)) for r, c, v in zip(*values.coords, values.data, strict=True)]
        assert sorted(found.rows) == sorted(rows) and not found.refused


# Other readers as oracles ------------------------------------------------------------------------


def generated(kind: str, rng: random.Random, folder: Path) -> tuple[Path, list[str]]:
    """A well-formed file of a kind, and its columns in the order user, item, rating, time."""
    n = rng.randrange(1, 200)
    names = [*KEYS]
    columns: dict[str, list[Any]] = {
        "user_id": [rng.choice([f"u{k}", f"{k:03d}", f"ü {k}"]) for k in (rng.randrange(50) for _ in range(n))],
        "item_id": [rng.randrange(10**6) for _ in range(n)],
        "rating": [rng.choice([rng.randrange(1, 6), rng.randrange(2, 11) / 2, rng.randrange(10**6) / 1000, 2.5e-3])
                   for _ in range(n)],
        "timestamp": [rng.randrange(2 * 10**8, 2 * 10**9) for _ in range(n)],
        "note": [rng.choice(["", "x", "a b", "ö"]) for _ in range(n)],
    }  # fmt: skip
    dates = rng.random() < 0.5
    table = pl.DataFrame(columns, schema_overrides={"rating": pl.Float64})
    if dates:
        table = table.with_columns(pl.from_epoch("timestamp", time_unit="s"))
    order = [*columns]
    rng.shuffle(order)
    table = table.select(order)
    path = folder / f"r.{kind}"
    if kind == "parquet":
        table.write_parquet(path, row_group_size=rng.choice([7, 50, 1000]), compression=rng.choice(["zstd", "snappy"]))
    elif kind in ("csv", "tsv", "ssv", "psv", "csv.gz"):
        separator = {"tsv": "\t", "ssv": ";", "psv": "|"}.get(kind, ",")
        text = table.write_csv(separator=separator, quote_style=rng.choice(["necessary", "always"]),
                               line_terminator=rng.choice(["\n", "\r\n"]),
                               datetime_format=rng.choice(["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"]))  # fmt: skip
        path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    else:
        plain = table.with_columns(pl.col("timestamp").dt.to_string("%Y-%m-%d %H:%M:%S")) if dates else table
        records = plain.to_dicts()
        if kind == "jsonl":
            path.write_text("".join(json.dumps(r, ensure_ascii=rng.random() < 0.5) + "\n" for r in records))
        else:
            path.write_text(json.dumps(records, indent=rng.choice([None, 1, 4])))
    return path, names


def by_polars(path: Path, kind: str) -> pl.DataFrame:
    if kind == "parquet":
        return pl.read_parquet(path)
    if kind in ("jsonl", "json"):
        return (pl.read_ndjson if kind == "jsonl" else pl.read_json)(path, infer_schema_length=None)
    return pl.read_csv(path, separator={"tsv": "\t", "ssv": ";", "psv": "|"}.get(kind, ","), infer_schema=False)


def by_duckdb(path: Path, kind: str) -> pl.DataFrame:
    import duckdb

    if kind == "parquet":
        query = f"read_parquet('{path}')"
    elif kind in ("jsonl", "json"):
        query = f"read_json('{path}', format='{'newline_delimited' if kind == 'jsonl' else 'array'}')"
    else:
        separator = {"tsv": "\\t", "ssv": ";", "psv": "|"}.get(kind, ",")
        query = f"read_csv('{path}', header=true, all_varchar=true, delim='{separator}')"
    return pl.from_arrow(duckdb.sql(f"select * from {query}").to_arrow_table())  # type: ignore[return-value]


def as_rows(table: pl.DataFrame) -> list[Row]:
    """User and item as text, rating as float32, time as whole seconds, by polars' own casts."""
    time = table["timestamp"]
    if time.dtype == pl.String and "-" in time[0]:
        time = time.str.replace("T", " ").str.to_datetime("%Y-%m-%d %H:%M:%S")
    seconds = time.dt.epoch("s") if time.dtype.is_temporal() else time.cast(pl.Int64)
    rating = table["rating"].cast(pl.Float64).to_numpy().astype(np.float32).tolist()
    users, items = (table[name].cast(pl.String).to_list() for name in ("user_id", "item_id"))
    return list(zip(users, items, rating, seconds.to_list(), strict=True))


ORACLE_KINDS = ("csv", "tsv", "ssv", "psv", "csv.gz", "jsonl", "json", "parquet")


def agree(files: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(files):
        rng = random.Random(seed)
        kind = ORACLE_KINDS[seed % len(ORACLE_KINDS)]
        path, names = generated(kind, rng, folder)
        monkeypatch.setattr(readers, "CHUNK_BYTES", rng.choice([300, 5000, 1 << 20]))
        found = read(path, columns=tuple(names))
        assert found.refused == [], f"{kind}, seed {seed}"
        for other in (by_polars, by_duckdb):
            assert found.rows == as_rows(other(path, kind)), f"{kind}, seed {seed}, {other.__name__}"


def test_other_readers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    agree(24, tmp_path, monkeypatch)


@pytest.mark.slow
def test_other_readers_agree_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    agree(300, tmp_path, monkeypatch)

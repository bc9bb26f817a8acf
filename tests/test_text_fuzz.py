"""Text of any kind is read as Python's own readers read it, whatever the size of a piece."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_files import Row, bare, check_whole, files_of, rows_of, run, sample, write_csv  # noqa: F401

from mfdist.errors import DataError, UsageError
from mfdist.prepare import readers

FIELD = st.one_of(
    st.text(alphabet='a1",;\n\r\t é\0', max_size=5), st.sampled_from(["5", "3.5", "nan", "-1e3", "u1", ""])
)


def fuzz_csv(table: list[list[str]], tail: str, chunk: int) -> None:
    import tempfile

    first = "user,item,1,1\n" * 3
    content = first + "\n".join(",".join(fields) for fields in table) + tail
    lines = content.replace("\r\n", "\n").split("\n")
    readers.CHUNK_BYTES, kept = chunk, readers.CHUNK_BYTES
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "f.csv"
            path.write_bytes(content.encode())
            try:
                dataset = run(path, "--out", f"{folder}/d", "--columns", "0,1,2,3", "--max-rejected", 1, "--lanes", 2)
            except (DataError, UsageError):
                return
            m = dataset.manifest
            refused = pq.read_table(f"{folder}/d/rejected.parquet")
            assert m.sources[0]["rows"] == len(rows_of(dataset)) + refused.num_rows
            assert refused.num_rows + sum(m.num_ratings.values()) <= len(lines)
            if '"' not in content:  # then a row is a line that is not empty
                assert m.sources[0]["rows"] == sum(bool(line.removesuffix("\r")) for line in content.split("\n"))
                for number, text in zip(refused["line"].to_pylist(), refused["text"].to_pylist(), strict=True):
                    assert text == content.split("\n")[number - 1].removesuffix("\r")
            readers.CHUNK_BYTES = 1 << 20
            again = run(path, "--out", f"{folder}/e", "--columns", "0,1,2,3", "--max-rejected", 1, "--lanes", 2)
            assert files_of(again) == files_of(dataset) and again.manifest.rejected == m.rejected
    finally:
        readers.CHUNK_BYTES = kept


TABLES = st.lists(st.lists(FIELD, min_size=0, max_size=6), max_size=25)


@given(TABLES, st.sampled_from(["", "\n", "\r\n", '"', '\n"a']), st.integers(5, 60))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_csv(table: list[list[str]], tail: str, chunk: int) -> None:
    fuzz_csv(table, tail, chunk)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(TABLES, st.sampled_from(["", "\n", "\r\n", '"', '\n"a']), st.integers(5, 60))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_csv_long(table: list[list[str]], tail: str, chunk: int) -> None:
    fuzz_csv(table, tail, chunk)


VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just([1]), st.just({}))
RECORD = st.one_of(
    st.dictionaries(st.sampled_from(["user_id", "asin", "rating", "timestamp", "x"]), VALUE).map(json.dumps),
    st.text(alphabet='{}":,a1[]\\', max_size=12), st.sampled_from(["{", "null", "deep"]),
)  # fmt: skip


def fuzz_json(records: list[str]) -> None:
    import tempfile

    good = '{"user_id": 1, "asin": "b", "rating": 4, "timestamp": 1}\n'
    content = good * 3 + "\n".join("[" * 99_999 if record == "deep" else record for record in records)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "f.jsonl").write_text(content)
        dataset = run(f"{folder}/f.jsonl", "--out", f"{folder}/d", "--columns", "user_id,asin,rating,timestamp",
                      "--max-rejected", 1, "--lanes", 2)  # fmt: skip
        m = dataset.manifest
        refused = pq.read_table(f"{folder}/d/rejected.parquet").num_rows
        assert m.sources[0]["rows"] == sum(bool(line.strip()) for line in content.split("\n"))
        assert m.sources[0]["rows"] == len(rows_of(dataset)) + refused


@given(st.lists(RECORD, max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_json_lines(records: list[str]) -> None:
    fuzz_json(records)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(st.lists(RECORD, max_size=20))
@settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzzed_json_lines_long(records: list[str]) -> None:
    fuzz_json(records)


@given(TABLES)
@settings(max_examples=100, deadline=None)
def test_well_formed_csv_is_read_as_pythons_csv_reads_it(table: list[list[str]]) -> None:
    from mfdist.prepare import delimited_text

    rows = [[*(f.replace("\r", "") for f in fields), *["x"] * 3][:3] for fields in table]
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    content = np.frombuffer(stream.getvalue().encode(), np.uint8)
    n = max(content.size, 1)
    begin, end, line, when = (np.empty(n, np.int64) for _ in range(4))
    start, length = np.zeros((4, n), np.int64), np.zeros((4, n), np.int64)
    extra = np.empty(n, np.uint8)
    count, lines, used = delimited_text.scan_delimited(
        content, content.size, 44, 0, True, 3, np.array([0, 1, 2, -1]), begin, end, line, start, length,
        np.zeros(n), when, np.zeros(n, np.uint8), extra,
    )  # fmt: skip
    both = np.concatenate([content, extra[:used]]).tobytes()
    found = [[both[start[c, i] : start[c, i] + length[c, i]].decode() for c in range(3)] for i in range(count)]
    assert found == list(csv.reader(io.StringIO(stream.getvalue(), newline=""))) == rows
    assert lines == stream.getvalue().count("\n")

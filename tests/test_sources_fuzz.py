"""Sources damaged at random, and sources read by others too: no traceback, no row miscounted, the same rows.

A damaged file is read with large and with small pieces. Either both end with a sentence, or both give the same rows and
refused rows, whose number is that of the records that an independent count finds.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from read_sources import KEYS, Read, Row, ratings, read

from mfdist.errors import DataError, UsageError, exit_code_of
from mfdist.prepare import readers
from mfdist.prepare.prepare import prepare_frame
from mfdist.prepare.times import TimeUnit

HEAD = ",".join(KEYS)


def delimited(rows: list[Row], sep: str = ",") -> bytes:
    return "".join(sep.join(map(str, row)) + "\n" for row in [KEYS, *rows]).encode()


def json_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(dict(zip(KEYS, row, strict=True))) + "\n" for row in rows).encode()


def json_array(rows: list[Row]) -> bytes:
    return json.dumps([dict(zip(KEYS, row, strict=True)) for row in rows], indent=rows[0][3] % 3 or None).encode()


def python_lines(rows: list[Row]) -> bytes:
    return "".join(f"{dict(zip(KEYS, row, strict=True))}\n" for row in rows).encode()


def parquet(rows: list[Row]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(dict(zip(KEYS, map(list, zip(*rows, strict=True)), strict=True))), stream)
    return stream.getvalue()


def matrix_market(rows: list[Row]) -> bytes:
    lines = "".join(f"{row[0][1:]} {row[1][1:]} {row[2]}\n".replace("0 ", "1 ", 1) for row in rows)
    return f"%%MatrixMarket matrix coordinate real general\n% made\n99 99 {len(rows)}\n{lines}".encode()


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ratings.csv", content)
    return stream.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zip": zipped}
FORMATS: dict[str, Callable[[list[Row]], bytes]] = {
    "csv": delimited, "tsv": lambda rows: delimited(rows, "\t"), "blanks": lambda rows: delimited(rows, "  "),
    "json lines": json_lines, "json array": json_array, "python lines": python_lines, "parquet": parquet,
    "matrix market": matrix_market, "gzip": lambda rows: gzip.compress(delimited(rows)),
    "zip": lambda rows: zipped(delimited(rows)),
    "utf-16": lambda rows: delimited(rows).decode().encode("utf-16"),
}  # fmt: skip
SPICE = (b'"', b"\n", b"\r\n", b",", b"\t", b" ", b"{", b"}", b"[", b"]", b"'", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf",
         b"NaN", b"-1", b"1e999", b"%", b"2020-01-01", b"\xd8\x00", b"9" * 30, b"null", b"True", b"()",
         b"0x" + b"f" * 9, b"-" * 300, b"[" * 300, b"1_0", b";", b"::", b"|")  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four faults: bytes changed, removed, put in, moved, said twice, or cut off."""
    for _ in range(rng.randrange(1, 5)):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 1, 2, 9, 60])
        kind = rng.randrange(6)
        if kind == 0:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[at + size :]
        elif kind == 2:
            content = content[:at] + rng.choice(SPICE) + content[at:]
        elif kind == 3:
            content = content[:at] + content[at : at + size] * 2 + content[at + size :]
        elif kind == 4:
            to = rng.randrange(len(content) + 1)
            content = content[:at] + content[to : to + size] + content[at:]
        elif rng.random() < 0.2:
            content = content[:at]
    return content


def made(kind: str, rng: random.Random) -> bytes:
    """A damaged file; what is packed is damaged inside or outside."""
    if kind in PACKED and rng.random() < 0.5:
        return PACKED[kind](damaged(delimited(ratings(rng)), rng))
    return damaged(FORMATS[kind](ratings(rng)), rng)


def counted(kind: str, content: bytes) -> int | None:
    """How many records a damaged file of lines has, where that can be told without reading it."""
    if kind in ("json lines", "python lines"):
        if kind == "python lines" and any(b in content for b in (b"\r", b"\0")):
            return None
        return sum(bool(line.strip()) for line in content.split(b"\n"))
    header = HEAD.replace(",", "\t" if kind == "tsv" else ",").encode() + b"\n"
    if kind in ("tsv", "csv") and b'"' not in content and content.startswith(header):
        return sum(line not in (b"", b"\r") for line in content.split(b"\n")) - 1
    return None


def outcome(
    path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch, units: Sequence[TimeUnit | None] = ()
) -> Read | str:
    monkeypatch.setattr(readers, "CHUNK_BYTES", piece_bytes)
    try:
        return read(path, units=units)
    except (DataError, UsageError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return type(error).__name__


def fuzz(kind: str, inputs: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many damaged files of a kind. What fails says the seed of its file."""
    refused = rejected = 0
    for seed in range(inputs):
        rng = random.Random(f"{kind} {seed}")
        content = made(kind, rng)
        path = folder / "r"
        path.write_bytes(content)
        try:
            whole = outcome(path, 1 << 20, monkeypatch)
            units = () if isinstance(whole, str) else whole.units
            pieces = outcome(path, rng.choice([50, 200, 700]), monkeypatch, units)
            if isinstance(whole, str) or isinstance(pieces, str):
                assert whole == pieces
                refused += 1
                continue
            assert whole.num_in == len(whole.rows) + len(whole.refused)
            assert (whole.rows, whole.refused, whole.num_in) == (pieces.rows, pieces.refused, pieces.num_in)
            expected = counted(kind, content)
            assert expected is None or whole.num_in == expected
            rejected += bool(whole.refused)
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}: {content!r}") from error
    assert refused and (rejected or kind == "parquet") and refused < inputs  # the faults are neither none nor fatal


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(kind, 80, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_long(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(kind, 2000, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_files(kind: str, tmp_path: Path) -> None:
    rows = ratings(random.Random(1))
    (tmp_path / "r").write_bytes(FORMATS[kind](rows))
    found = read(tmp_path / "r")
    assert found.refused == []
    if kind == "matrix market":
        assert [row[2] for row in found.rows] == [row[2] for row in rows]
    else:
        assert found.rows == [(*row[:2], pytest.approx(row[2]), row[3]) for row in rows]


def test_literals_are_parsed_and_not_run(tmp_path: Path) -> None:
    """What only running it would say is refused; what a literal says is what Python says."""
    record = {"user_id": "u", "item_id": 0x10, "rating": -1.5, "timestamp": 10**9, "x": [(1, {2}), b"3", None]}
    lines = [repr(record), "{'user_id': 'u', 'item_id': 1 + 1, 'rating': 1, 'timestamp': 1}",
             "{'user_id': __import__('os').getcwd(), 'item_id': 1, 'rating': 1, 'timestamp': 1}"]  # fmt: skip
    (tmp_path / "r").write_text("\n".join(lines))
    found = read(tmp_path / "r")
    assert ast.literal_eval(lines[0]) == record and found.rows == [("u", "16", -1.5, 10**9)]
    assert [line for line, reason, _ in found.refused if reason == "not a Python literal"] == [2, 3]


@dataclass
class Frame:
    """A data frame of any library that gives Arrow tables."""

    table: pa.Table

    def to_arrow(self) -> pa.Table:
        return self.table


def arrow_columns() -> dict[str, pa.Array]:
    """Two values of every kind of type that Arrow has for a column."""
    bits = pa.array([b"0123456789abcdef", None], pa.binary(16))
    by_type = [
        pa.array([1, None], kind) for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.decimal128(9, 2),
                                               pa.decimal256(50, 1), pa.time32("s"), pa.time64("ns"), pa.date32(),
                                               pa.date64(), pa.timestamp("ns", "UTC"), pa.duration("s"))
    ]  # fmt: skip
    by_type += [pa.array(["1", None], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    by_type += [pa.array([b"1", None], kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())]
    by_type += [
        bits, pa.ExtensionArray.from_storage(pa.uuid(), bits), pa.array([True, None]), pa.nulls(2),
        pa.array(["1", None]).dictionary_encode(), pc.run_end_encode(pa.array([1, 1])), pa.array([[1], None]),
        pa.array([{"a": 1}, None]), pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int8())), pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8())),
    ]  # fmt: skip
    return {str(array.type): array for array in by_type}


@pytest.mark.parametrize("role", KEYS)
def test_every_type_of_a_column_is_read_or_refused(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Parquet where it can be written, and as a data frame's column."""
    monkeypatch.setattr("mfdist.prepare.write_pass.write_dataset_report", lambda *_: None)
    columns: dict[str, Any] = {"user_id": ["a", "b"], "item_id": [1, 2], "rating": [3, 4], "timestamp": [5, 6]}
    for kind, array in arrow_columns().items():
        table = pa.table({**columns, role: array})
        path = tmp_path / "r.parquet"
        with contextlib.suppress(pa.ArrowException):  # Arrow has types that Parquet has not
            pq.write_table(table, path)
            try:
                assert read(path).num_in == 2, kind
            except DataError as error:
                assert str(path) in str(error), kind
        code = exit_code_of(lambda: prepare_frame(Frame(table), str(tmp_path / "d"), max_rejected=1.0, lanes=1) and 0)
        assert code in (0, 3), kind


@pytest.mark.parametrize("encoded", [False, True])
def test_a_text_that_is_no_utf_8_in_a_rejected_row_is_shown(encoded: bool, tmp_path: Path) -> None:
    """Parquet does not check its texts: those of a damaged file may be any bytes."""
    offsets, content = pa.py_buffer(b"\0\0\0\0\2\0\0\0\5\0\0\0"), pa.py_buffer(b"u1u2\xb0")
    users = pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])
    users = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), users) if encoded else users
    pq.write_table(pa.table({"user_id": users, "item_id": ["a", "b"], "rating": [5.0, 3.0]}), tmp_path / "r.parquet")
    found = read(tmp_path / "r.parquet")
    assert found.rows == [("u1", "a", 5.0)]
    ((line, reason, text),) = found.refused
    assert line == 2 and reason == "not valid UTF-8" and "u2\N{REPLACEMENT CHARACTER}" in text

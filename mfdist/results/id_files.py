"""Files that name users, items, or pairs of them: text with one id a line, CSV with a header, or Parquet."""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.id_text import id_texts
from mfdist.errors import UsageError


class IdFile(NamedTuple):
    """The ids of a file in its order: ``ids`` of a list, or both sides of pairs; ``checksum`` of its bytes."""

    ids: list[str]
    user_ids: list[str] | None
    item_ids: list[str] | None
    checksum: str


def read_ids(path: str, flag: str, column: str) -> list[str]:
    """The ids of one side, each once; UsageError where there is none."""
    file = read_id_file(path, flag, column)
    found = list(dict.fromkeys(file.ids))
    if not found:
        raise UsageError(f"--{flag} {storage.redact(path)} has no {column.removesuffix('_id')} ids.")
    return found


def read_id_file(path: str, flag: str, column: str) -> IdFile:
    """A file of ids of ``column`` ('user_id' or 'item_id'), or of pairs where it has the columns user_id and item_id.

    UsageError where it is not there, or no such file.
    """
    shown = f"--{flag} {storage.redact(path)}"
    try:
        content = storage.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{shown}: there is no such file.") from None
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        table = _table(content)
        if table is None:
            lines = content.decode("utf-8-sig").splitlines()
            return IdFile([line for line in lines if line], None, None, checksum)
        if {"user_id", "item_id"} <= set(table.column_names):
            both = table.select(["user_id", "item_id"]).drop_null()
            return IdFile([], id_texts(both.column(0)), id_texts(both.column(1)), checksum)
        chosen = table[column] if column in table.column_names else table.column(0)
        return IdFile([name for name in id_texts(chosen.drop_null()) if name], None, None, checksum)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise UsageError(f"{shown} is neither text nor Parquet ({error}).") from None


def _table(content: bytes) -> pa.Table | None:
    """Parquet, or CSV with a header that names user_id or item_id; None for plain lines."""
    if content[:4] == b"PAR1":
        return pq.read_table(io.BytesIO(content))
    head = content[: 1 << 16].decode("utf-8-sig", "replace").split("\n", 1)[0].strip()
    separator = "\t" if "\t" in head else ","
    names = [name.strip().strip('"') for name in head.split(separator)]
    if not {"user_id", "item_id"} & set(names):
        return None
    text = content.removeprefix(b"\xef\xbb\xbf")
    return pacsv.read_csv(
        io.BytesIO(text),
        parse_options=pacsv.ParseOptions(delimiter=separator),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        ),
    )

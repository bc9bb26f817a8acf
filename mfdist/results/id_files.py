"""Files that name users, items, or pairs of them: text with one id a line, CSV with a header, or Parquet.

What an id is, is what preparation takes for one (``data.id_text``).
"""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.data.id_text import id_texts
from mfdist.errors import UsageError
from mfdist.prepare import delimited_text
from mfdist.prepare.delimited_rows import head_bytes
from mfdist.prepare.headers import spellings
from mfdist.prepare.layout import Layout
from mfdist.prepare.readers import parse
from mfdist.prepare.row_checks import REASONS, Rules
from mfdist.results.block_ids import texts_of

MARK, BLANKS = "\ufeff", " \t"
EMPTY = (REASONS[delimited_text.USER], REASONS[delimited_text.ITEM])


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
        if content[:4] == b"PAR1":
            return _of_table(pq.read_table(io.BytesIO(content)), column, checksum)
        separator, names = _header(content)
        if names:
            return _of_text(content, separator, names, column, checksum, shown)
        lines = (line.lstrip(MARK).strip(BLANKS) for line in content.decode().splitlines())
        return IdFile(id_texts(line for line in lines if line), None, None, checksum)
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise UsageError(f"{shown} is neither text nor Parquet ({error}).") from None


def _of_table(table: pa.Table, column: str, checksum: str) -> IdFile:
    if {"user_id", "item_id"} <= set(table.column_names):
        both = table.select(["user_id", "item_id"]).drop_null()
        return IdFile([], id_texts(both.column(0)), id_texts(both.column(1)), checksum)
    chosen = table[column] if column in table.column_names else table.column(0)
    return IdFile([name for name in id_texts(chosen.drop_null()) if name], None, None, checksum)


def _header(content: bytes) -> tuple[str, list[str]]:
    """The separator and the names of a first line that names user_id or item_id, in whatever spelling; else none."""
    head = content[: 1 << 16].decode("utf-8", "replace").split("\n", 1)[0].strip()
    separator = "\t" if "\t" in head else ","
    known = {"userid": "user_id", "itemid": "item_id"}
    names = [known.get(spellings(name)[0], name) for name in head.split(separator)]
    return separator, names if {"user_id", "item_id"} & set(names) else []


def _of_text(content: bytes, separator: str, names: list[str], column: str, checksum: str, shown: str) -> IdFile:
    """Delimited text below a header, read as preparation reads it; UsageError names a row that cannot be."""
    places = [names.index(name) if name in names else -1 for name in ("user_id", "item_id")]
    pairs = min(places) >= 0
    if not pairs:
        places = [names.index(column) if column in names else 0] * 2
    layout = Layout("delimited", shown, (*places, -1, -1), separator, header=1, num_fields=len(names))
    content += b"\n"
    block = parse((content, 0, head_bytes(content, layout, True)), layout, Rules(0, None, False))
    for line, reason, text in block.rejects:
        if pairs or reason not in EMPTY:
            raise UsageError(f"{shown}, line {line + 1}: {reason}: {text[:120]!r}.")
    users, items = (texts_of(block, side).to_pylist() for side in range(2))
    return IdFile([], users, items, checksum) if pairs else IdFile(users, None, None, checksum)

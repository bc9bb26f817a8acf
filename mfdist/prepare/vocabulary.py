"""users.parquet and items.parquet while they are written: row, id, training ratings of that row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.prepare.lanes import ParquetFile
from mfdist.prepare.spill import Ids

VOCABULARY_GROUP = 65_536
VOCABULARY_SCHEMA = pa.schema(
    [pa.field("row", pa.int64(), False), pa.field("id", pa.string(), False), pa.field("ratings", pa.int64(), False)]
)


class Vocabulary:
    """users.parquet or items.parquet while it is written, in row groups of 65,536."""

    def __init__(self, file: ParquetFile) -> None:
        self.file = file
        self._held: list[pa.Table] = []
        self._held_rows = self._row = 0

    def write(self, ids: Ids, places: npt.NDArray[np.int64], ratings: npt.NDArray[np.int64]) -> None:
        """The ids at ``places``, numbered on, with their training ratings."""
        for first in range(0, places.size, 1 << 22):  # a string column addresses its text with 31 bits
            edges, content = ids.take(places[first : first + (1 << 22)])
            number = edges.size - 1
            text = pa.LargeStringArray.from_buffers(number, pa.py_buffer(edges), pa.py_buffer(content))
            self.write_texts(text, ratings[first : first + number])

    def write_texts(self, text: Any, ratings: npt.NDArray[np.int64]) -> None:
        """Ids (an Arrow string array), numbered on, with their training ratings."""
        number = len(text)
        rows = pa.array(np.arange(self._row, self._row + number))
        columns = [rows, text.cast(pa.string()), pa.array(ratings)]
        self._held.append(pa.Table.from_arrays(columns, schema=VOCABULARY_SCHEMA))
        self._row += number
        self._held_rows += number
        whole = self._held_rows // VOCABULARY_GROUP * VOCABULARY_GROUP
        if whole:
            table = pa.concat_tables(self._held)
            self._put(table.slice(0, whole))
            self._held, self._held_rows = [table.slice(whole)], self._held_rows - whole

    def flush(self) -> None:
        """Write what is left; the file is complete when its context ends."""
        if self._held_rows:
            self._put(pa.concat_tables(self._held))
        self._held, self._held_rows = [], 0

    def _put(self, rows: pa.Table) -> None:
        """Row groups whose bytes do not depend on the pieces that the rows came in."""
        for first in range(0, rows.num_rows, VOCABULARY_GROUP):
            self.file.write(rows.slice(first, VOCABULARY_GROUP).combine_chunks())


@contextmanager
def vocabulary_file(root: str, side: str, scratch: str, suffix: str = "") -> Iterator[Vocabulary]:
    """``side``.parquet (and ``suffix``) to be written; complete when the context ends."""
    options = {"use_dictionary": False, "write_statistics": True}
    with ParquetFile(root, f"{side}.parquet{suffix}", VOCABULARY_SCHEMA, scratch, **options) as file:
        yield Vocabulary(file)

"""Items like an item, users like a user: by the cosine or the inner product of their factors, biases left aside::

rows, scores = Neighbours(model, "items", "cosine").of(some_rows, k=10)      # (rows, 10) each, best first
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.errors import UsageError
from mfdist.results.exported_model import ExportedModel
from mfdist.results.item_index import ItemIndex
from mfdist.results.item_lists import ItemLists
from mfdist.results.recommendation_table import ids_of_rows

MEASURES = ("cosine", "inner")
BLOCK_ROWS = 1 << 16

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]


class Neighbours:
    """The rows of one side of a model, made ready once."""

    def __init__(self, model: ExportedModel, side: str, measure: str, device: Any = None) -> None:
        """``side``: users or items; ``device``: a torch device, None: processors. UsageError for another measure."""
        if measure not in MEASURES:
            raise UsageError(f"measure '{measure}' is not known; known are {', '.join(MEASURES)}.")
        self._model, self._side, self._measure = model, side, measure
        self._table = model.item_embedding if side == "items" else model.user_embedding
        self.count = len(self._table)
        whole = np.empty(self._table.shape, np.float32)
        for first in range(0, self.count, BLOCK_ROWS):
            block = np.arange(first, min(first + BLOCK_ROWS, self.count))
            whole[block] = self._measured(block)
        self._index = ItemIndex(whole, None, device=device)

    def of(self, rows: Ints, k: int) -> tuple[Ints, Floats32]:
        """Rows and scores of the ``k`` most similar to each of ``rows``: (rows, k) each.

        Best first, equal scores by row, itself left out; -1 and -inf fill up. A row of zeros is like no other (cosine
        0).
        """
        return self._index.search(self._measured(rows), k, ItemLists(np.arange(len(rows) + 1), rows))

    def table(self, ids: pa.Array, rows: Ints, k: int) -> pa.Table:
        """The same as rows of :func:`schema_of`, without the places that have no neighbour; ``ids``: of ``rows``."""
        found, scores = self.of(rows, k)
        kept = np.flatnonzero(found.ravel() >= 0)
        similar = ids_of_rows(self._model, self._side, found.ravel()[kept])
        columns = [ids.take(pa.array(kept // k)), similar, (kept % k + 1).astype(np.int32), scores.ravel()[kept]]
        return pa.table(columns, schema=schema_of(self._side))

    def _measured(self, rows: Ints) -> Floats32:
        """The factors of ``rows``, of length one where cosines are wanted."""
        factors = np.asarray(self._table[rows], np.float32)
        if self._measure == "inner":
            return factors
        length = np.sqrt(np.square(factors, dtype=np.float64).sum(axis=1))
        return (factors / np.where(length > 0, length, 1)[:, None]).astype(np.float32)


def schema_of(side: str) -> pa.Schema:
    """Columns of a list of neighbours: item_id (or user_id), similar_id, rank (from 1) and score."""
    return pa.schema([(f"{side[:-1]}_id", pa.string()), ("similar_id", pa.string()), ("rank", pa.int32()),
                      ("score", pa.float32())])  # fmt: skip

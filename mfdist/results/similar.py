"""Items like an item, users like a user: by the cosine or the inner product of their factors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mfdist.errors import UsageError
from mfdist.results.export import ExportedModel
from mfdist.results.item_index import ItemIndex
from mfdist.results.item_lists import ItemLists

MEASURES = ("cosine", "inner")

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]


def similar_rows(model: ExportedModel, side: str, rows: Ints, k: int, measure: str) -> tuple[Ints, Floats32]:
    """Rows and scores of the ``k`` most similar of ``side`` ('users' or 'items') to each of ``rows``: (rows, k) each.

    Best first, equal scores by row, itself left out; -1 and -inf fill up. A row of zeros is like no other (cosine 0).
    """
    if measure not in MEASURES:
        raise UsageError(f"measure '{measure}' is not known; known are {', '.join(MEASURES)}.")
    factors = np.asarray(model.item_embedding if side == "items" else model.user_embedding)
    if measure == "cosine":
        length = np.sqrt(np.einsum("nd,nd->n", factors, factors, dtype=np.float64))
        factors = (factors / np.where(length > 0, length, 1)[:, None]).astype(np.float32)
    own = ItemLists(np.arange(len(rows) + 1), rows)
    return ItemIndex(factors, None).search(factors[rows], k, own)

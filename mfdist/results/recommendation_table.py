"""Best items as a table of ids: user_id, item_id, rank (from 1), score (predicted rating)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist import storage
from mfdist.errors import UsageError
from mfdist.results.exported_model import ExportedModel

SCHEMA = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])

Ints = npt.NDArray[np.int64]


def table_of(model: ExportedModel, user_ids: pa.Array, items: Ints, ratings: npt.NDArray[np.float64]) -> pa.Table:
    """Rows user_id, item_id, rank, score of (users, k) item rows and ratings, without the places that have no item."""
    kept = np.flatnonzero(items.ravel() >= 0)
    k = items.shape[1]
    item_ids = ids_of_rows(model, "items", items.ravel()[kept])
    rank = (kept % k + 1).astype(np.int32)
    score = ratings.ravel()[kept].astype(np.float32)
    return pa.table([user_ids.take(pa.array(kept // k)), item_ids, rank, score], schema=SCHEMA)


def ids_of_rows(model: ExportedModel, side: str, rows: Ints) -> pa.Array:
    """Ids of rows of 'users' or 'items', in any order."""
    if not len(rows):
        return pa.array([], pa.string())
    first = int(rows.min())
    ids = model.ids(side, first, int(rows.max()) + 1).combine_chunks()
    return ids.take(pa.array(rows - first))


def refuse_unknown(model: ExportedModel, unknown: Sequence[str]) -> None:
    """UsageError for ids outside the vocabulary of a model that has nothing to rank items by for them."""
    if unknown and not model.has_biases:
        raise UsageError(
            f"{len(unknown)} of the users are not in the vocabulary of {storage.redact(model.run)} (the first: "
            f"'{unknown[0]}'), and {model.config['model']} without biases cannot rank items for them. Leave them out, "
            "or use a model with biases."
        )

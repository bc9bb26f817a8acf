"""The rows of ids by a table of hashes, for those who ask often: microseconds an id, not a pass over all ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mfdist.prepare.ids import RowTable, hash_ids, text_spans

LARGEST_BYTES = (1 << 31) - 1
"""Of texts in one Arrow array."""


class IdLookup:
    """Rows of ids that lie in memory; beside their texts 24 to 32 bytes an id: hash, row, and a share of the index."""

    def __init__(self, ids: pa.Array, table: RowTable, rows: npt.NDArray[np.int64]) -> None:
        self._ids, self._table, self._rows = ids, table, rows

    @staticmethod
    def of(ids: pa.ChunkedArray) -> IdLookup | None:
        """Of ids (strings, one a row); None where their texts are too many bytes, or two of them share a hash."""
        if ids.nbytes > LARGEST_BYTES:
            return None
        whole = pa.concat_arrays(ids.chunks) if ids.num_chunks else pa.array([], pa.string())
        hashes = _hashed(whole)
        order = np.argsort(hashes)
        hashes = hashes[order]
        if (hashes[1:] == hashes[:-1]).any():
            return None
        return IdLookup(whole, RowTable(hashes), order)

    def rows(self, wanted: pa.Array) -> npt.NDArray[np.int64]:
        """int64 (wanted,), -1 for an id that is not there."""
        places = self._table.rows(_hashed(wanted))
        there = np.flatnonzero(places >= 0)
        rows = self._rows[places[there]]
        same = pc.equal(self._ids.take(pa.array(rows)), wanted.take(pa.array(there))).to_numpy(zero_copy_only=False)
        found = np.full(len(wanted), -1, np.int64)
        found[there[same]] = rows[same]
        return found


def _hashed(texts: pa.Array) -> npt.NDArray[np.uint64]:
    hashes, checks = np.empty(len(texts), np.uint64), np.empty(len(texts), np.uint64)
    hash_ids(*text_spans(texts), np.uint64(0), hashes, checks)
    return hashes

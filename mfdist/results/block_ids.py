"""The ids of a block of checked rows as an Arrow array of texts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mfdist.prepare.ids import gather_bytes
from mfdist.prepare.row_checks import Block


def texts_of(block: Block, side: int) -> pa.Array:
    """Side 0: the users' ids, 1: the items'."""
    length = block.length[side]
    offsets = np.concatenate([[0], np.cumsum(length)])
    content = np.empty(int(offsets[-1]), np.uint8)
    gather_bytes(block.content, block.start[side], length, content)
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.string(), len(length), buffers)

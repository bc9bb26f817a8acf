"""A rank's rows on its device, from the second pass over a dataset on: the host sends only their order.

A row that is kept costs the way to the device its 4-byte position instead of its 12 bytes, and the host one column of
permuting and copying instead of three. The device gathers the columns, from memory that is fast at it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mfdist.data.batch_blocks import POSITION, AssembledBlock
from mfdist.data.row_groups import Columns

SHARE_OF_DEVICE = 0.25


def fits_on_device(rows: int, row_bytes: int, device: torch.device) -> bool:
    """Whether ``rows`` may lie on ``device``: a quarter of what is free there, and countable by positions."""
    free = torch.cuda.mem_get_info(device)[0]
    return rows <= np.iinfo(POSITION).max and rows * row_bytes <= SHARE_OF_DEVICE * free


class DeviceRows:
    """The rows of ``units``, one unit after the other, in three tensors on ``device``.

    ``firsts``: for each unit the position of its first row.
    """

    def __init__(self, units: Iterable[Columns], rows: int, device: torch.device) -> None:
        self.firsts: list[int] = []
        self._columns: list[torch.Tensor] = []
        filled = 0
        for unit in units:
            # Copies: what was decoded without one may not be written, which torch does not have.
            given = [torch.from_numpy(column.copy()) for column in (unit.user, unit.item, unit.rating)]
            if not self._columns:
                self._columns = [torch.empty(rows, dtype=column.dtype, device=device) for column in given]
            for column, target in zip(given, self._columns, strict=True):
                target[filled : filled + len(column)].copy_(column)
            self.firsts.append(filled)
            filled += len(unit.user)
        assert filled == rows

    def gather(self, block: AssembledBlock) -> AssembledBlock:
        """The rows at the positions (rows,) on the device that are a block's only column."""
        (positions,) = block.columns
        columns = tuple(torch.index_select(column, 0, positions) for column in self._columns)
        return AssembledBlock(columns, block.first_step, block.sizes)

"""A batch of ratings on a GPU: sorted by row of one side, and rows' local numbers; nothing waits for the device."""

from __future__ import annotations

import numpy as np
import torch
import triton

from mfdist.kernels import gpu_arguments as given
from mfdist.kernels import gpu_grouping
from mfdist.model.tables import Layout


class Sorted:
    """A batch's ratings by row of one side: ``order`` (ratings,) int64, the others int32. ``number`` (ratings,) the
    segment of each position of it; ``rows`` the distinct ones, ascending, ``starts`` where each begins in the order
    (and one past the last); ``slot`` (ratings,) the segment of each rating; ``count`` (1,) how many rows."""

    def __init__(self, ratings: int, device: torch.device, head: torch.Tensor | None = None) -> None:
        """``head``: int32 (ratings or more,) that sorting may write over; batches that are sorted in turn share it."""
        sizes = (ratings, ratings, ratings, ratings + 1, 1)
        space = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
        self.number, self.rows, self.slot, self.starts, self.count = space
        self.head = torch.zeros(ratings, dtype=torch.int32, device=device) if head is None else head
        self.order = torch.zeros(0, dtype=torch.int64, device=device)

    def sort(self, ids: torch.Tensor) -> torch.Tensor:
        """Fill all from ``ids`` (ratings,) int32, stably; returns them sorted."""
        n = len(ids)
        grid = (triton.cdiv(n, given.SORT_BLOCK),)
        ids, self.order = torch.sort(ids, stable=True)
        gpu_grouping.heads[grid](ids, self.head, n, given.SORT_BLOCK, **given.OPTIONS)
        torch.cumsum(self.head[:n], 0, dtype=torch.int32, out=self.number[:n])
        gpu_grouping.list_rows[grid](
            ids, self.order, self.number, self.rows, self.starts, self.slot, self.count, n, given.SORT_BLOCK,
            **given.OPTIONS,
        )  # fmt: skip
        return ids


class LocalNumbers:
    """Global rows that a rank holds to its local numbers, on the device, without a word to the host."""

    def __init__(self, layout: Layout, rank: int, device: torch.device) -> None:
        spans = [span for span in layout.ranges_of(rank) if span[0] < span[1]]
        starts = np.cumsum([0, *(end - first for first, end in spans)])
        shifts = {first: int(start) - first for (first, _end), start in zip(spans, starts, strict=False)}
        self._identity = not any(shifts.values())
        self._firsts = torch.tensor(sorted(shifts), dtype=torch.int64, device=device)
        self._shifts = torch.tensor([shifts[first] for first in sorted(shifts)], dtype=torch.int64, device=device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 or int32 (rows,) as given where the numbers are the same."""
        if self._identity:
            return rows
        return rows + self._shifts[torch.searchsorted(self._firsts, rows.long(), right=True) - 1]

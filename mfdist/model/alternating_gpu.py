"""The arithmetic of a ranking's step on a GPU: what ratings add by Triton's kernels, the rest of a step by torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton

from mfdist.cluster.precision import full_float32
from mfdist.kernels import gpu_alternating
from mfdist.kernels.gpu_arguments import OPTIONS

ROWS = 1 << 18
"""Rows that are solved at once."""


class Ratings(NamedTuple):
    """Ratings by row: ``grouped`` int32 (ratings,) the others; ``row``, ``first``, ``end`` int64 (segments,) the row of
    each segment and where its ratings lie; ``bounds`` int64 (rows + 1,) the segments of each row; ``counts`` int64."""

    grouped: torch.Tensor
    row: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    bounds: torch.Tensor
    counts: torch.Tensor

    def part(self, low: int, high: int) -> Ratings:
        """Of rows ``low`` to ``high``."""
        a, b = self.bounds[[low, high]].tolist()
        bounds = self.bounds[low : high + 1] - a
        return Ratings(self.grouped, self.row[a:b] - low, self.first[a:b], self.end[a:b], bounds, self.counts[low:high])


class GpuSolver:
    """``model.alternating.Solver`` on CUDA, and on CPU tensors in Triton's interpreter. A repeated call gives the same
    bits."""

    def group(self, rows: torch.Tensor, others: torch.Tensor, count: int) -> Ratings:
        counts = torch.bincount(rows, minlength=count)
        grouped = others.int()[torch.sort(rows, stable=True).indices]
        segments = -(-counts // gpu_alternating.SEGMENT)
        bounds = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
        torch.cumsum(segments, 0, out=bounds[1:])
        row = torch.repeat_interleave(torch.arange(count, device=rows.device), segments)
        ends = torch.cumsum(counts, 0)
        before = torch.arange(len(row), device=rows.device) - bounds[row]
        first = (ends - counts)[row] + before * gpu_alternating.SEGMENT
        end = torch.minimum(first + gpu_alternating.SEGMENT, ends[row])
        return Ratings(grouped, row, first, end, bounds, counts)

    def counts(self, ratings: Ratings) -> torch.Tensor:
        return ratings.counts

    def solve(
        self, ratings: Ratings, others: torch.Tensor, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor,
        steps: int,
    ) -> float:  # fmt: skip
        squares = 0.0
        for low in range(0, len(x), ROWS):
            high = min(low + ROWS, len(x))
            part = ratings.part(low, high)
            trained = part.counts.nonzero()[:, 0]
            some, pull = x[low:high].clone(), pulls[low:high]
            rest, square = self._observed(part, others, some, 1.0, 1.0)
            self.begin(some, gram, pull, rest)
            ahead = rest.clone()
            for _ in range(steps):
                self.advance(some, gram, pull, rest, ahead, self.observe(part, others, ahead, 0.0, -1.0))
            x[trained + low] = some[trained]
            squares += float(square)
        return squares

    def observe(
        self, ratings: Ratings, others: torch.Tensor, x: torch.Tensor, wanted: float, sign: float
    ) -> torch.Tensor:
        return self._observed(ratings, others, x, wanted, sign)[0]

    def _observed(
        self, ratings: Ratings, others: torch.Tensor, x: torch.Tensor, wanted: float, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`observe`, and the sum of (wanted - y.x)^2 in float64."""
        dim, segments = x.shape[1], len(ratings.row)
        columns = triton.next_power_of_2(dim)
        part = torch.empty(segments, dim, device=x.device)
        square = torch.empty(segments, device=x.device)
        sums = torch.zeros(len(x), dim, device=x.device)
        if segments:
            gpu_alternating.observe[(segments,)](
                ratings.row, ratings.first, ratings.end, ratings.grouped, others, others.stride(0), x, x.stride(0),
                wanted, sign, part, square, dim, columns, max(16, gpu_alternating.TILE // columns), **OPTIONS,
            )  # fmt: skip
            gpu_alternating.add_segments[(len(x),)](ratings.bounds, part, sums, dim, columns, **OPTIONS)
        return sums, square.double().sum()

    def begin(self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor) -> None:
        rest -= _dense(x, gram, pulls)

    def advance(
        self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor, ahead: torch.Tensor,
        image: torch.Tensor,
    ) -> None:  # fmt: skip
        image = image + _dense(ahead, gram, pulls)
        before, along = (rest * rest).sum(1), (ahead * image).sum(1)
        goes = (along > 0)[:, None]
        length = (before / along)[:, None]
        x += torch.where(goes, length * ahead, 0)
        rest -= torch.where(goes, length * image, 0)
        turn = ((rest * rest).sum(1) / before)[:, None]
        ahead.copy_(torch.where(goes, rest + turn * ahead, ahead))

    def gram(self, rows: torch.Tensor) -> npt.NDArray[np.float64]:
        whole: npt.NDArray[np.float64] = (rows.T @ rows).cpu().numpy()
        return whole

    def close(self) -> None:
        """Nothing: there are no threads."""


def _dense(x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor) -> torch.Tensor:
    """(w G + c I) x of each row."""
    with full_float32():
        return x @ gram + pulls[:, None] * x

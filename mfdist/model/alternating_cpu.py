"""The arithmetic of a ranking's step on a CPU: ``kernels.alternating`` on ranges of rows, a thread each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mfdist.kernels import alternating
from mfdist.kernels.worker_threads import Workers


class Ratings(NamedTuple):
    """Ratings by row, see ``kernels.alternating.group``."""

    starts: npt.NDArray[np.int64]
    grouped: npt.NDArray[np.int32]


class CpuSolver:
    """``model.alternating.Solver`` with so many ``threads``."""

    def __init__(self, threads: int) -> None:
        self._workers = Workers(threads)

    def group(self, rows: torch.Tensor, others: torch.Tensor, count: int) -> Ratings:
        starts, grouped = np.zeros(count + 1, np.int64), np.empty(len(rows), np.int32)
        alternating.group(rows.int().numpy(), others.int().numpy(), starts, grouped)
        return Ratings(starts, grouped)

    def counts(self, ratings: Ratings) -> torch.Tensor:
        return torch.from_numpy(np.diff(ratings.starts))

    def solve(
        self, ratings: Ratings, others: torch.Tensor, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor,
        steps: int,
    ) -> float:  # fmt: skip
        squares: dict[int, float] = {}
        arrays = [_whole(others), _whole(x), gram.numpy(), pulls.numpy()]

        def solve(low: int, high: int) -> None:
            squares[low] = alternating.solve(low, high, *ratings, *arrays, steps)

        self._workers.ranges(len(pulls), solve)
        return sum(squares[low] for low in sorted(squares))

    def observe(
        self, ratings: Ratings, others: torch.Tensor, x: torch.Tensor, wanted: float, sign: float
    ) -> torch.Tensor:
        sums = np.empty(x.shape, np.float32)
        given = _whole(others), x.numpy(), np.float32(wanted), np.float32(sign)
        self._workers.ranges(
            len(sums), lambda low, high: alternating.observe(low, high, *ratings, *given, sums)
        )  # fmt: skip
        return torch.from_numpy(sums)

    def begin(self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor) -> None:
        arrays = [tensor.numpy() for tensor in (x, gram, pulls, rest)]
        self._workers.ranges(len(x), lambda low, high: alternating.begin(low, high, *arrays))

    def advance(
        self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor, ahead: torch.Tensor,
        image: torch.Tensor,
    ) -> None:  # fmt: skip
        arrays = [tensor.numpy() for tensor in (x, gram, pulls, rest, ahead, image)]
        self._workers.ranges(len(x), lambda low, high: alternating.advance(low, high, *arrays))

    def gram(self, rows: torch.Tensor) -> npt.NDArray[np.float64]:
        whole: npt.NDArray[np.float64] = rows.numpy().T @ rows.numpy()
        return whole

    def close(self) -> None:
        self._workers.close()


def _whole(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """Rows of a table with what lies between them, which makes one piece of memory of them: kernels are compiled for
    that, and take as many columns as they need."""
    stride = rows.stride(0) if len(rows) else rows.shape[1]
    return torch.as_strided(rows, (len(rows), stride), (stride, 1)).numpy()

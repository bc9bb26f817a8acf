"""What a step minimises beside the fit: the weight of a rating, and what draws rows towards zero.

With ``mean`` the loss of a step is the sum of squared errors over its rows divided by their number (the vignette's);
with ``sum`` it is half the sum, so that the learning rate is that of one rating, as in Surprise and LIBMF, and a last
short batch moves nothing further than the others. The penalty of a rating falls on its own two rows w:

    factors: (A + L / n) |w|^2        n: training ratings of the row, so that L is what a whole epoch puts on it

Example: row_l2 6 and l2 0.02 give a user of 3 ratings 2.02 at each of them, and one of 300 ratings 0.04.

A stands for what is not known of the row on the other side: the square of a product is (p^2 + var p) q^2 on average, so
that each rating puts the variance of the user's factor p, as far as its own ratings leave it open, on the item's q. A
row of few ratings on one side makes that large for a row of many on the other, which has no other penalty to speak of:
with 12 items and thousands of users of 3 ratings, factors fitted without it are noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mfdist.kernels import BIAS_COLUMN

Floats32 = npt.NDArray[np.float32]
USER, ITEM = 0, 1


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``l2``, per rating, and ``row_l2``, per row and epoch (None where there is none): each of the factors of users,
    of items, biases of users, of items, scales of users, of items."""

    reduction: str = "mean"
    l2: tuple[float, ...] = (0.0,) * 6
    row_l2: tuple[float, ...] | None = None

    def weight(self, global_rows: int) -> float:
        """What the sum of squares of a step is multiplied by."""
        return 0.5 if self.reduction == "sum" else 1 / global_rows

    @property
    def penalised(self) -> bool:
        return any(self.l2) or self.row_l2 is not None

    def penalties(self, side: int, dim: int, width: int, members: int) -> Floats32:
        """float32 (2, width): A and L of each column of a user's or an item's row (``side``)."""
        of = np.array([self.l2, self.row_l2 or (0.0,) * 6], np.float32)
        penalties = np.empty((2, width), np.float32)
        penalties[:] = of[:, side, None]
        if members:
            part = dim // members
            penalties[:, BIAS_COLUMN[side] :: part] = of[:, 2 + side, None]
            penalties[:, BIAS_COLUMN[1 - side] :: part] = of[:, 4 + side, None]
        else:
            penalties[:, dim:] = of[:, 2 + side, None]
        return penalties


def six_of(l2: Sequence[float]) -> tuple[float, ...]:
    """``Objective.l2`` of (factors, biases): both sides alike, scales like biases; six numbers as they are."""
    if len(l2) == 6:
        return tuple(l2)
    factors, biases = l2
    return (factors, factors, biases, biases, biases, biases)


def shares_of(counts: npt.NDArray[np.int64]) -> Floats32:
    """1 / n of rows with ``counts`` training ratings (1 for rows without)."""
    return (1 / np.maximum(counts, 1)).astype(np.float32)

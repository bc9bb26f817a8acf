"""What a step minimises beside the fit: the weight of a rating, and what draws rows towards zero.

With ``mean`` the loss of a step is the sum of squared errors over its rows divided by their number (the vignette's);
with ``sum`` it is half the sum, so that the learning rate is that of one rating, as in Surprise and LIBMF, and a last
short batch moves nothing further than the others. The penalty of a rating falls on its own two rows w:

    factors: (A + L / n) |w|^2        n: training ratings of the row, so that L is what a whole epoch puts on it

Example: row_l2 6 and l2 0.02 give a user of 3 ratings 2.02 at each of them, and one of 300 ratings 0.04.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mfdist.kernels import BIAS_COLUMN

Floats32 = npt.NDArray[np.float32]
USER, ITEM = 0, 1


@dataclass(frozen=True, kw_only=True)
class Objective:
    """``l2``: (factors, biases) per rating. ``row_l2``: factors of users, of items, biases of users, of items, scales
    of users, of items, per row and epoch; None where there is none."""

    reduction: str = "mean"
    l2: tuple[float, float] = (0.0, 0.0)
    row_l2: tuple[float, ...] | None = None

    def weight(self, global_rows: int) -> float:
        """What the sum of squares of a step is multiplied by."""
        return 0.5 if self.reduction == "sum" else 1 / global_rows

    @property
    def penalised(self) -> bool:
        return any(self.l2) or self.row_l2 is not None

    def penalties(self, side: int, dim: int, width: int, members: int) -> Floats32:
        """float32 (2, width): A and L of each column of a user's or an item's row (``side``)."""
        factors, biases = self.l2
        rows = self.row_l2 or (0.0,) * 6
        penalties = np.empty((2, width), np.float32)
        penalties[0], penalties[1] = factors, rows[side]
        if members:
            part = dim // members
            for column, row in ((BIAS_COLUMN[side], rows[2 + side]), (BIAS_COLUMN[1 - side], rows[4 + side])):
                penalties[0, column::part], penalties[1, column::part] = biases, row
        else:
            penalties[0, dim:], penalties[1, dim:] = biases, rows[2 + side]
        return penalties


def shares_of(counts: npt.NDArray[np.int64]) -> Floats32:
    """1 / n of rows with ``counts`` training ratings (1 for rows without)."""
    return (1 / np.maximum(counts, 1)).astype(np.float32)

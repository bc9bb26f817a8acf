"""The factors of a user of a ranking whom training did not know, from the items that they chose.

With the items' side fixed, the row that training would have given: the exact solution of its normal equations

    (sum over chosen q q' + w G + c(n) I) p = sum over chosen q        (w, c: ``model.alternating``; G: of all items)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mfdist.results.exported_model import ExportedModel

BLOCK = 1 << 16

Floats = npt.NDArray[np.float64]


class ChoiceSolver:
    """Solves users of one ranking; the Gram matrix of its items is made once."""

    def __init__(self, model: ExportedModel) -> None:
        self._items = model.item_embedding
        about = model.config["ranking"]
        self._pairs, self._penalty, self._others = about["pairs"], about["penalty"], about["items"]
        self._gram = np.zeros((model.config["dim"],) * 2)
        for first in range(0, len(self._items), BLOCK):
            part = np.asarray(self._items[first : first + BLOCK], np.float64)
            self._gram += part.T @ part

    def solve(self, items: npt.NDArray[np.int64]) -> Floats:
        """Factors (dim,) of a user who chose ``items`` (rows, none of them -1); zeros of none."""
        rows = np.asarray(self._items[items], np.float64)
        pull = self._penalty * (len(items) + self._pairs * self._others)
        matrix = rows.T @ rows + self._pairs * self._gram + pull * np.eye(len(self._gram))
        return np.linalg.solve(matrix, rows.sum(axis=0))

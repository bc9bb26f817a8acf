"""The two models of the vignette over any kind of embedding table.

``MF``: the dot product of two embeddings. ``MFAdvanced``: dot product + user bias + item bias + offset, then a sigmoid
into the rating scale widened by half a step; ``sigmoid``, ``bias`` and ``init`` are its switches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from mfdist.embedding import Table, initial_rows
from mfdist.metrics import round_to_scale

__all__ = ["MF", "Form", "MFAdvanced", "Scored", "round_to_scale", "sigmoid_range"]

USER_TABLE, ITEM_TABLE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a prediction is computed from. ``sigmoid_range`` (low, high) is None where there is no sigmoid."""

    model: str
    dim: int
    bias: bool
    init: bool
    sigmoid_range: tuple[float, float] | None

    @property
    def width(self) -> int:
        """Columns of a table row: the factors and, where the model has it, the bias behind them."""
        return self.dim + self.bias

    def rating_of_score(self, score: torch.Tensor) -> torch.Tensor:
        if self.sigmoid_range is None:
            return score
        low, high = self.sigmoid_range
        return low + (high - low) * torch.sigmoid(score)

    def score(self, user: torch.Tensor, item: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Scores (rows,) of table rows, both (rows, width)."""
        score = (user[:, : self.dim] * item[:, : self.dim]).sum(dim=1)
        if self.bias:
            score = score + user[:, self.dim] + item[:, self.dim]
        return score if offset is None else score + offset

    def initial(self, seed: int, table: int, first: int, end: int) -> torch.Tensor:
        """Initial weights (end - first, width) of global rows: uniform(0, 0.05) with biases 0, or all normal(0, 1)."""
        if not self.init:
            return initial_rows(seed, table, first, end, self.width, "normal")
        rows = torch.zeros(end - first, self.width)
        rows[:, : self.dim] = initial_rows(seed, table, first, end, self.dim, "uniform")
        return rows


def sigmoid_range(low: float, high: float, step: float) -> tuple[float, float]:
    """The rating scale widened by half a step on both sides: (0.5, 5.5) for whole stars 1 to 5.

    ``step`` is the smallest difference between two ratings; at least 1/100 of the scale is used.
    """
    half = max(step, (high - low) / 100) / 2
    return low - half, high + half


class Scored(NamedTuple):
    """Predictions (rows,), and the table rows behind them (rows, width) for a penalty on them."""

    prediction: torch.Tensor
    user: torch.Tensor
    item: torch.Tensor


class MF(nn.Module):
    """prediction = <p_u, q_i>."""

    def __init__(self, form: Form, user: Table, item: Table) -> None:
        super().__init__()
        self.form, self.user, self.item = form, user, item
        self.offset: nn.Parameter | None = None

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> Scored:
        """Predictions for global rows ``user`` and ``item``, both (rows,); collective where a table is sharded."""
        p, q = self.user(user), self.item(item)
        return Scored(self.form.rating_of_score(self.form.score(p, q, self.offset)), p, q)

    def settle(self) -> None:
        """Bring every row of both tables to the present, in place."""
        self.user.settle()
        self.item.settle()


class MFAdvanced(MF):
    """prediction = sigmoid_range(<p_u, q_i> + b_u + b_i + offset); without ``bias`` neither biases nor offset."""

    def __init__(self, form: Form, user: Table, item: Table) -> None:
        super().__init__(form, user, item)
        if form.bias:
            self.offset = nn.Parameter(torch.zeros(1, device=user.world.device))

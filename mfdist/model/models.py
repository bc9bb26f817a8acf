"""The two models of the vignette over any kind of embedding table.

``MF``: the dot product of two embeddings. ``MFAdvanced``: dot product + user bias + item bias + offset, then a sigmoid
into the rating scale widened by half a step; ``sigmoid``, ``bias`` and ``init`` are its switches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from mfdist.kernels import BIAS_COLUMN
from mfdist.metrics import round_to_scale
from mfdist.model.initial_weights import initial_rows
from mfdist.model.objective import ITEM, USER
from mfdist.model.tables import Table
from mfdist.model.units import AS_GIVEN, Units

__all__ = ["MF", "Form", "MFAdvanced", "Scored", "round_to_scale", "sigmoid_range"]

USER_TABLE, ITEM_TABLE = USER, ITEM


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a prediction is computed from. ``sigmoid_range`` (low, high), in ratings, is None where there is no sigmoid.
    What is learned, and so scores and weights, is in ``units``; an export is in ratings."""

    model: str
    dim: int
    bias: bool
    init: bool
    sigmoid_range: tuple[float, float] | None
    members: int = 0
    """Groups of factors, each a model by itself whose mean is the prediction; 0: one model, its bias a column apart.

    A member's row holds its bias inside: column 1 of a user's part is added to the score, and multiplies column 1 of
    the item's, which so scales it; column 0 likewise with the sides exchanged.
    """
    init_std: float | None = None
    """Factors begin as normal(0, init_std / sqrt(factors of a member)), biases at 0; None: as ``init`` says."""
    units: Units = AS_GIVEN
    implicit: float = 0.0
    """What a user chose to rate counts as well: with a > 0 a user's factors are p + w S, w = a / sqrt(n), S being the
    sum of the factors (not biases) q of the n items that the user rated. (SVD++, Koren 2008, with the items' second
    vectors tied to their first.) Neither S nor its gradient is added up anew for each rating: a user's row holds two
    running sums behind its weights, renewed by every rating of the user,

        bag           <-  bag (1 - 1/n) + w q             what joins the factors
        bag gradient  <-  bag gradient (1 - 1/n) + w g q

    g being the loss's derivative by the score: what the user's items get as their gradient through the bag, at each
    rating of theirs. While a rating is learned, its own item, which a new item will not be, is left out of both:
    w |q|^2 is taken from the score as a constant, and w g q from the bag gradient.
    """

    @property
    def width(self) -> int:
        """Trained columns of a table row: the factors and, where the model has one apart, the bias behind them."""
        return self.dim + (self.bias and not self.members)

    def stored_width(self, side: int) -> int:
        """Columns of a user's or an item's row, a user's bag and its gradient included."""
        return self.width + (2 * self.dim if self.implicit and side == USER else 0)

    def is_factor(self) -> torch.Tensor:
        """float32 (dim,): 0 for the columns of members that are biases and scales, 1 for all others."""
        chosen = torch.ones(self.dim)
        if self.members:
            chosen[BIAS_COLUMN[USER] :: self.part] = chosen[BIAS_COLUMN[ITEM] :: self.part] = 0
        return chosen

    def factors_of_users(self, rows: torch.Tensor) -> torch.Tensor:
        """Factors (rows, dim) of users' stored rows, with their bags."""
        own = rows[:, : self.dim]
        return own + rows[:, self.width : self.width + self.dim].detach() if self.implicit else own

    @property
    def part(self) -> int:
        """Factors of a member."""
        return self.dim // max(self.members, 1)

    def value_of_score(self, score: torch.Tensor) -> torch.Tensor:
        """The predicted rating in ``units``."""
        if self.value_range is None:
            return score
        low, high = self.value_range
        return low + (high - low) * torch.sigmoid(score)

    @property
    def value_range(self) -> tuple[float, float] | None:
        """``sigmoid_range`` in ``units``."""
        return None if self.sigmoid_range is None else self.units.span(*self.sigmoid_range)

    @property
    def exported_scale(self) -> float:
        """An exported score is this times the model's own, plus :attr:`exported_shift`."""
        spread = self.units.spread
        return spread if self.sigmoid_range is None else math.copysign(1.0, spread)

    @property
    def exported_shift(self) -> float:
        return self.units.mean if self.sigmoid_range is None else 0.0

    def score(self, user: torch.Tensor, item: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Scores (rows,) of stored rows (rows, stored width)."""
        return self.member_scores(user, item, offset).mean(dim=1)

    def member_scores(
        self, user: torch.Tensor, item: torch.Tensor, offset: torch.Tensor | None, share: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores (rows, members or 1) of stored rows.

        ``share`` (rows,): one over the users' training ratings, while these very ratings are learned from.
        """
        shape = (len(user), max(self.members, 1), self.part)
        p, q = self.factors_of_users(user).reshape(shape), item[:, : self.dim].reshape(shape)
        score = (p * q).sum(dim=2)
        if self.implicit and share is not None:
            own = (q.detach().square() * self.is_factor().to(q.device).view(shape[1:])).sum(dim=2)
            score = score - self.implicit * share.sqrt()[:, None] * own
        if self.members:
            score = score + p[:, :, BIAS_COLUMN[USER]] + q[:, :, BIAS_COLUMN[ITEM]]
        elif self.bias:
            score = score + (user[:, self.dim] + item[:, self.dim])[:, None]
        return score if offset is None else score + offset

    def exported(self, side: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embedding (rows, dim) and bias (rows,) whose plain dot product and sum give the exported score."""
        embedding, bias = self.factors_of_users(rows) if side == USER else rows[:, : self.dim], None
        if self.members:
            bias = embedding[:, BIAS_COLUMN[side] :: self.part].mean(dim=1)
        elif self.bias:
            bias = rows[:, self.dim]
        factor = self._exported_factor(side)
        if self.units.plain:
            return embedding / self.members**0.5 if self.members else embedding, bias
        return embedding * factor, None if bias is None else bias * self.exported_scale

    def _exported_factor(self, side: int) -> float:
        """What an exported embedding is multiplied by; the items' carries the sign of the scale."""
        scale = self.exported_scale
        root = math.sqrt(abs(scale) / max(self.members, 1))
        return math.copysign(root, scale) if side == ITEM else root

    def imported(self, side: int, embedding: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The reverse of :meth:`exported`: rows (rows, width), without bags."""
        rows = embedding / self._exported_factor(side)
        return rows if bias is None or self.members else torch.cat([rows, bias[:, None] / self.exported_scale], dim=1)

    def initial(self, seed: int, table: int, first: int, end: int) -> torch.Tensor:
        """Initial stored rows (end - first, stored width) of global rows, bags empty."""
        rows = torch.zeros(end - first, self.stored_width(table))
        rows[:, : self.width] = self._initial(seed, table, first, end)
        return rows

    def _initial(self, seed: int, table: int, first: int, end: int) -> torch.Tensor:
        """Initial weights (end - first, width) of global rows: uniform(0, 0.05) with biases 0, or all normal(0, 1)."""
        if self.init_std is not None:
            rows = torch.zeros(end - first, self.width)
            normal = initial_rows(seed, table, first, end, self.dim, "normal")
            rows[:, : self.dim] = normal * (self.init_std / self.part**0.5)
            if self.members:
                rows[:, BIAS_COLUMN[USER] :: self.part] = rows[:, BIAS_COLUMN[ITEM] :: self.part] = 0
            return rows
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
    """Of each member (rows, members or 1), in the form's units; and the stored rows behind them (rows, stored width)
    of each side."""

    scores: torch.Tensor
    predictions: torch.Tensor
    user: torch.Tensor
    item: torch.Tensor


class MF(nn.Module):
    """prediction = <p_u, q_i>."""

    def __init__(self, form: Form, user: Table, item: Table) -> None:
        super().__init__()
        self.form, self.user, self.item = form, user, item
        self.offset: nn.Parameter | None = None

    def forward(self, user: torch.Tensor, item: torch.Tensor, share: torch.Tensor | None = None) -> Scored:
        """Predictions for global rows ``user`` and ``item``, both (rows,); collective where a table is sharded.

        ``share``: see :meth:`Form.member_scores`.
        """
        p, q = self.user(user), self.item(item)
        scores = self.form.member_scores(p, q, self.offset, share)
        return Scored(scores, self.form.value_of_score(scores), p, q)

    def settle(self) -> None:
        """Bring every row of both tables to the present, in place."""
        self.user.settle()
        self.item.settle()


class MFAdvanced(MF):
    """prediction = sigmoid_range(<p_u, q_i> + b_u + b_i + offset); without ``bias`` neither biases nor offset."""

    def __init__(self, form: Form, user: Table, item: Table, fixed_offset: float | None = None) -> None:
        """``fixed_offset``, in the form's units: the offset is this and not learned; else it is learned from 0."""
        super().__init__(form, user, item)
        if form.bias:
            start = torch.full((1,), fixed_offset or 0.0, device=user.world.device)
            self.offset = nn.Parameter(start, requires_grad=fixed_offset is None)

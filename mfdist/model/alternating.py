"""A ranking's step: all ratings at once, users' rows solved while items stand, then items' while users stand.

What is minimised (Hu, Koren, Volinsky 2008; the penalty by Rendle et al. 2021, "Revisiting the performance of iALS"):

    sum over ratings of (1 - p.q)^2  +  w sum over all pairs of (p.q)^2  +  sum over rows of c(n) |row|^2

A rating counts whatever its value: that somebody chose the item. With N ratings, U users and I items that have any,

    w    = a N / (U I)                       all pairs together weigh a times as much as the ratings (``unobserved``)
    c(n) = b s (n + w times the rows of the other side),    s = (U / N)^0.5 + (I / N)^0.5

n being the row's ratings and s what chance alone gives a matrix of this density: its largest singular value beside
that of the means. So a and b mean the same on any data. Example: 800,000 ratings of 6,000 users and 3,700 items with
a = 20 have w = 0.72 and s = 0.155.

No pair is sampled: G = sum of q q' over all items (dim x dim) gives every user the items that he did not rate, and a
row takes a few conjugate gradient steps (``kernels.alternating``) from where it stood. Users are at home. Items' rows
are solved by their owners, who are sent what each rank's ratings add, by the same exchange as in any other step; sums
over ranks go in the order of the ranks, G in float64.

Users without ratings get the mean of the others, which ranks by popularity; items without ratings are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mfdist.kernels import alternating
from mfdist.kernels.worker_threads import Workers
from mfdist.model.models import MF
from mfdist.model.tables import Exchange, ShardedTable

Floats32 = npt.NDArray[np.float32]
STEPS = 3
"""Of conjugate gradients a row and epoch; more gain nothing, as the other side moves too."""
GRAM_ROWS = 1 << 16


class Ratings(NamedTuple):
    """This rank's ratings by row of one side, see ``kernels.alternating.group``."""

    starts: npt.NDArray[np.int64]
    grouped: npt.NDArray[np.int32]

    @staticmethod
    def by(rows: Any, others: Any, count: int) -> Ratings:
        starts, grouped = np.zeros(count + 1, np.int64), np.empty(len(rows), np.int32)
        alternating.group(rows, others, starts, grouped)
        return Ratings(starts, grouped)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)


class Weights(NamedTuple):
    """w, and c(n) = penalty (n + w other rows), of the module's text."""

    pairs: float
    penalty: float
    """b s."""
    users: float
    items: float
    """Rows with ratings."""

    @staticmethod
    def of(unobserved: float, penalty: float, users: float, items: float, ratings: int) -> Weights:
        noise = (users / ratings) ** 0.5 + (items / ratings) ** 0.5
        return Weights(unobserved * ratings / (users * items), penalty * noise, float(users), float(items))

    def pulls(self, counts: Any, others: float) -> Floats32:
        return (self.penalty * (np.asarray(counts, np.float64) + self.pairs * others)).astype(np.float32)


class AlternatingStep(nn.Module):
    """The step of an epoch; ``forward`` is collective. :meth:`close` it: its threads hold on to the tables."""

    def __init__(self, model: MF, unobserved: float, penalty: float, threads: int) -> None:
        """``unobserved``: a, ``penalty``: b of the module's text."""
        super().__init__()
        assert isinstance(model.user, ShardedTable) and isinstance(model.item, ShardedTable)
        self.model, self._pair = model, (model.user, model.item)
        self._world, self._dim = model.item.world, model.form.dim
        self._unobserved, self._penalty = unobserved, penalty
        self._workers = Workers(threads)
        self.squared_error = torch.zeros((), dtype=torch.float64)
        """Of this rank's ratings before the last step: (1 - score)^2."""

    def forward(self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int) -> torch.Tensor:
        """Solve both sides once, from all ratings of this rank; returns their squared error over ``global_rows``."""
        users, items = self._pair
        local, item_rows = users.local_int32(user.numpy()), item.numpy()
        unique = np.flatnonzero(np.bincount(item_rows, minlength=items.layout.num_rows))
        place = np.zeros(items.layout.num_rows, np.int32)
        place[unique] = np.arange(len(unique))
        of_user = Ratings.by(local, place[item_rows], len(users.rows.last))
        of_item = Ratings.by(place[item_rows], local, len(unique))
        asked = items.exchange(torch.from_numpy(unique))
        mine, trained = asked.mine, torch.from_numpy(np.flatnonzero(of_user.counts))
        counts = asked.give_back(torch.from_numpy(of_item.counts.astype(np.float32))[:, None])[:, 0].numpy()
        weights = self._weights(len(trained), len(mine), global_rows)
        _keep(items, mine, 0.0)
        squares = self._solve_users(of_user, asked, weights)
        self._solve_items(of_item, trained, asked, counts, weights)
        _keep(users, trained, self._mean(users, trained, weights.users))
        for table, touched in ((users, trained), (items, mine)):
            vars(table)["step"] = table.step + 1
            table.rows.last.fill_(-table.step)
            table.rows.last[touched] = table.step
        self.squared_error = torch.tensor(squares, dtype=torch.float64)
        return torch.tensor(squares / global_rows)

    def settle(self) -> None:
        """Nothing: no row waits for anything."""

    def close(self) -> None:
        """End the threads."""
        self._workers.close()

    def _weights(self, users: int, items: int, ratings: int) -> Weights:
        all_users, all_items = self._world.sum([float(users), float(items)])
        return Weights.of(self._unobserved, self._penalty, float(all_users), float(all_items), ratings)

    def _solve_users(self, ratings: Ratings, asked: Exchange, weights: Weights) -> float:
        """Returns the squared error of this rank's ratings before."""
        users, items = self._pair
        others = asked.fetch(items.rows.weight[asked.mine], exact=True).numpy()
        pulls = weights.pulls(ratings.counts, weights.items)
        return self._solve(ratings, others, users.packed.numpy(), self._gram(items, asked.mine, weights), pulls)

    def _solve_items(
        self, ratings: Ratings, trained: torch.Tensor, asked: Exchange, counts: Floats32, weights: Weights
    ) -> None:
        users, items = self._pair
        gram, pulls = self._gram(users, trained, weights), weights.pulls(counts, weights.users)
        rows = items.rows.weight[asked.mine]
        if self._world.size == 1:
            self._solve(ratings, users.packed.numpy(), rows.numpy(), gram, pulls)
        else:
            self._solve_with_others(ratings, rows, asked, gram, pulls)
        items.rows.weight[asked.mine] = rows

    def _solve(self, ratings: Ratings, others: Floats32, rows: Floats32, gram: Floats32, pulls: Floats32) -> float:
        squares: dict[int, float] = {}

        def solve(low: int, high: int) -> None:
            squares[low] = alternating.solve(low, high, *ratings, others, rows, gram, pulls, STEPS)

        self._workers.ranges(len(pulls), solve)
        return sum(squares[low] for low in sorted(squares))

    def _solve_with_others(
        self, ratings: Ratings, rows: torch.Tensor, asked: Exchange, gram: Floats32, pulls: Floats32
    ) -> None:
        """Items' ``rows``, whose ratings lie on all ranks; collective."""
        others = self._pair[0].packed.numpy()

        def observed(rows: torch.Tensor, wanted: float, sign: float) -> Floats32:
            asking = asked.fetch(rows, exact=True).numpy()
            sums = np.empty_like(asking)
            numbers = np.float32(wanted), np.float32(sign)
            self._workers.ranges(
                len(sums), lambda low, high: alternating.observe(low, high, *ratings, others, asking, *numbers, sums)
            )
            total: Floats32 = asked.give_back(torch.from_numpy(sums)).numpy()
            return total

        x, rest = rows.numpy(), observed(rows, 1.0, 1.0)
        self._workers.ranges(len(x), lambda low, high: alternating.begin(low, high, x, gram, pulls, rest))
        ahead = rest.copy()
        for _ in range(STEPS):
            image = observed(torch.from_numpy(ahead), 0.0, -1.0)

            def advance(low: int, high: int, image: Floats32 = image) -> None:
                alternating.advance(low, high, x, gram, pulls, rest, ahead, image)

            self._workers.ranges(len(x), advance)

    def _gram(self, table: ShardedTable, rows: torch.Tensor, weights: Weights) -> Floats32:
        """w G of a side, from the ``rows`` that have ratings."""
        total = np.zeros((self._dim, self._dim))
        for part in _parts(table, rows):
            total += part.T @ part
        gram: Floats32 = (weights.pairs * np.sum(self._world.gather(total), axis=0)).astype(np.float32)
        return gram

    def _mean(self, table: ShardedTable, rows: torch.Tensor, count: float) -> torch.Tensor:
        total = np.zeros(self._dim)
        for part in _parts(table, rows):
            total += part.sum(axis=0)
        return torch.from_numpy(np.sum(self._world.gather(total), axis=0) / count).float()


def _parts(table: ShardedTable, rows: torch.Tensor) -> Iterator[npt.NDArray[np.float64]]:
    """Weights of local ``rows`` in float64, some at a time."""
    for first in range(0, len(rows), GRAM_ROWS):
        yield table.rows.weight[rows[first : first + GRAM_ROWS]].double().numpy()


def _keep(table: ShardedTable, rows: torch.Tensor, otherwise: float | torch.Tensor) -> None:
    """Set all local rows but ``rows``."""
    others = torch.ones(len(table.rows.last), dtype=torch.bool)
    others[rows] = False
    table.rows.weight[others] = otherwise

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

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mfdist.data.loader import Batch
from mfdist.errors import UsageError
from mfdist.model.alternating_cpu import CpuSolver
from mfdist.model.models import MF
from mfdist.model.tables import Exchange, ShardedTable

STEPS = 3
"""Of conjugate gradients a row and epoch; more gain nothing, as the other side moves too."""
GRAM_ROWS = 1 << 16


class Solver(Protocol):
    """The arithmetic of a side's rows on one kind of device; tensors are float32 and lie there.

    ``x``: (rows, dim) the rows that are solved; ``others``: (other rows, dim) those that stand; ``gram``: (dim, dim)
    w G; ``pulls``: (rows,) c; ``ratings``: what ``group`` gave.
    """

    def group(self, rows: torch.Tensor, others: torch.Tensor, count: int) -> Any:
        """Ratings, integers ``rows`` below ``count`` and ``others``, by row."""

    def counts(self, ratings: Any) -> torch.Tensor:
        """int64 (rows,): ratings of each row."""

    def solve(
        self, ratings: Any, others: torch.Tensor, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, steps: int
    ) -> float:
        """Rows of ``x`` with ratings, in place; returns the sum of (1 - y.x)^2 before."""

    def observe(self, ratings: Any, others: torch.Tensor, x: torch.Tensor, wanted: float, sign: float) -> torch.Tensor:
        """(rows, dim): the sums over ratings of sign (wanted - y.x) y."""

    def begin(self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor) -> None:
        """``rest``, what ``observe`` gives for 1 and 1 summed over all ranks, becomes b - A x."""

    def advance(
        self, x: torch.Tensor, gram: torch.Tensor, pulls: torch.Tensor, rest: torch.Tensor, ahead: torch.Tensor,
        image: torch.Tensor,
    ) -> None:  # fmt: skip
        """A step of conjugate gradients; ``image``: what ``observe`` gives of ``ahead`` for 0 and -1, of all ranks."""

    def gram(self, rows: torch.Tensor) -> npt.NDArray[np.float64]:
        """(dim, dim): the sum of y y' over float64 ``rows``."""

    def close(self) -> None:
        """End the threads."""


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

    def pulls(self, counts: torch.Tensor, others: float) -> torch.Tensor:
        """float32 (rows,): c."""
        return (self.penalty * (counts.double() + self.pairs * others)).float()


class AlternatingStep(nn.Module):
    """The step of an epoch; ``forward`` is collective. :meth:`close` it: its threads hold on to the tables."""

    def __init__(
        self, model: MF, unobserved: float, penalty: float, threads: int, solver: Solver | None = None
    ) -> None:
        """``unobserved``: a, ``penalty``: b of the module's text; ``solver``: another one than the device's own."""
        super().__init__()
        assert isinstance(model.user, ShardedTable) and isinstance(model.item, ShardedTable)
        self.model, self._pair = model, (model.user, model.item)
        self._world, self._dim = model.item.world, model.form.dim
        self._unobserved, self._penalty = unobserved, penalty
        self._solver = solver or solver_on(model.item.world.device, threads)
        self.squared_error = torch.zeros((), dtype=torch.float64, device=self._world.device)
        """Of this rank's ratings before the last step: (1 - score)^2."""

    def forward(self, user: torch.Tensor, item: torch.Tensor, rating: torch.Tensor, global_rows: int) -> torch.Tensor:
        """Solve both sides once, from all ratings of this rank; returns their squared error over ``global_rows``."""
        users, items = self._pair
        local = users.local(user)
        touched = torch.bincount(item, minlength=items.layout.num_rows) > 0
        unique = touched.nonzero()[:, 0]
        place = torch.cumsum(touched, 0)[item] - 1
        of_user = self._solver.group(local, place, len(users.rows.last))
        of_item = self._solver.group(place, local, len(unique))
        asked = items.exchange(unique)
        mine, trained = asked.mine, self._solver.counts(of_user).nonzero()[:, 0]
        counts = asked.give_back(self._solver.counts(of_item).float()[:, None])[:, 0]
        weights = self._weights(len(trained), len(mine), global_rows)
        _keep(items, mine, 0.0)
        squares = self._solve_users(of_user, asked, weights)
        self._solve_items(of_item, trained, asked, counts, weights)
        _keep(users, trained, self._mean(users, trained, weights.users))
        for table, rows in ((users, trained), (items, mine)):
            vars(table)["step"] = table.step + 1
            table.rows.last.fill_(-table.step)
            table.rows.last[rows] = table.step
        self.squared_error.fill_(squares)
        return (self.squared_error / global_rows).float()

    @property
    def transport(self) -> str:
        """What item rows go through."""
        return "the process group"

    def follow(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``: no step needs to know what comes."""
        return iter(batches)

    def settle(self) -> None:
        """Nothing: no row waits for anything."""

    def close(self) -> None:
        """End the threads."""
        self._solver.close()

    def _weights(self, users: int, items: int, ratings: int) -> Weights:
        all_users, all_items = self._world.sum([float(users), float(items)])
        return Weights.of(self._unobserved, self._penalty, float(all_users), float(all_items), ratings)

    def _solve_users(self, ratings: Any, asked: Exchange, weights: Weights) -> float:
        """Returns the squared error of this rank's ratings before."""
        users, items = self._pair
        others = asked.fetch(items.rows.weight[asked.mine], exact=True)
        pulls = weights.pulls(self._solver.counts(ratings), weights.items)
        gram = self._gram(items, asked.mine, weights)
        return self._solver.solve(ratings, others, users.rows.weight, gram, pulls, STEPS)

    def _solve_items(
        self, ratings: Any, trained: torch.Tensor, asked: Exchange, counts: torch.Tensor, weights: Weights
    ) -> None:
        users, items = self._pair
        gram, pulls = self._gram(users, trained, weights), weights.pulls(counts, weights.users)
        rows = items.rows.weight[asked.mine]
        if self._world.size == 1:
            self._solver.solve(ratings, users.rows.weight, rows, gram, pulls, STEPS)
        else:
            self._solve_with_others(ratings, rows, asked, gram, pulls)
        items.rows.weight[asked.mine] = rows

    def _solve_with_others(
        self, ratings: Any, x: torch.Tensor, asked: Exchange, gram: torch.Tensor, pulls: torch.Tensor
    ) -> None:
        """Items' rows ``x``, whose ratings lie on all ranks; collective."""
        others = self._pair[0].rows.weight

        def observed(rows: torch.Tensor, wanted: float, sign: float) -> torch.Tensor:
            asking = asked.fetch(rows, exact=True)
            return asked.give_back(self._solver.observe(ratings, others, asking, wanted, sign))

        rest = observed(x, 1.0, 1.0)
        self._solver.begin(x, gram, pulls, rest)
        ahead = rest.clone()
        for _ in range(STEPS):
            self._solver.advance(x, gram, pulls, rest, ahead, observed(ahead, 0.0, -1.0))

    def _gram(self, table: ShardedTable, rows: torch.Tensor, weights: Weights) -> torch.Tensor:
        """w G of a side, from the ``rows`` that have ratings."""
        total = np.zeros((self._dim, self._dim))
        for part in _parts(table, rows):
            total += self._solver.gram(part)
        whole = weights.pairs * np.sum(self._world.gather(total), axis=0)
        return torch.from_numpy(whole).float().to(table.world.device)

    def _mean(self, table: ShardedTable, rows: torch.Tensor, count: float) -> torch.Tensor:
        total = np.zeros(self._dim)
        for part in _parts(table, rows):
            total += part.sum(dim=0).cpu().numpy()
        return torch.from_numpy(np.sum(self._world.gather(total), axis=0) / count).float().to(table.world.device)


def solver_on(device: torch.device, threads: int) -> Solver:
    """Of a device; UsageError where there is none for it."""
    if device.type == "cpu":
        return CpuSolver(threads)
    if importlib.util.find_spec("triton") is None:
        raise UsageError("--objective ranking on a GPU needs Triton (pip install triton); --device cpu does without.")
    from mfdist.model.alternating_gpu import GpuSolver

    return GpuSolver()


def _parts(table: ShardedTable, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Weights of local ``rows`` in float64, some at a time."""
    for first in range(0, len(rows), GRAM_ROWS):
        yield table.rows.weight[rows[first : first + GRAM_ROWS]].double()


def _keep(table: ShardedTable, rows: torch.Tensor, otherwise: float | torch.Tensor) -> None:
    """Set all local rows but ``rows``."""
    others = torch.ones(len(table.rows.last), dtype=torch.bool, device=table.world.device)
    others[rows] = False
    table.rows.weight[others] = otherwise

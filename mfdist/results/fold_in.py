"""The factors of a user whom training did not know, or who has rated more since, from ratings of known items.

With the items' side fixed a user's row w minimises what training minimises over the user's own n ratings

    sum over ratings of (r - prediction)^2 + sum over columns of (n A + L) w^2        (A, L: see ``model.objective``)

which is a ridge regression, solved exactly; member by member where a model has members, each with its bias and scale
inside. What the user rated counts as in training (``implicit``), a rating's own item left out of it. Through a sigmoid
the same is minimised by Gauss-Newton steps, halved where they would not lower it. Penalties are meant in the units that
ratings were learned in (``model.units``), so the row is solved in them; the answer is in those of the export.

Where training had no such penalty (AdamW's decay is none) the prior is that of the trained users: their mean and
variance in each column, against the mean square of the training errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfdist.model.objective import six_of
from mfdist.results.exported_model import ExportedModel
from mfdist.results.fold_in_ranking import ChoiceSolver

SAMPLED_USERS = 100_000
STEPS, HALVINGS = 20, 8
SMALL = 1e-9

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Folded(NamedTuple):
    """A user as the export has them: factors (dim,) and bias."""

    factors: Floats
    bias: float


def with_training(old_items: Ints, old: npt.NDArray[Any], items: Ints, ratings: Floats) -> tuple[Ints, Floats]:
    """Training ratings and new ones of a user: a new rating of an item takes the place of the old ones."""
    kept = ~np.isin(old_items, items)
    return np.concatenate([old_items[kept], items]), np.concatenate([old[kept].astype(np.float64), ratings])


class FoldIn:
    """Solves users of one model."""

    def __init__(self, model: ExportedModel) -> None:
        config = model.config
        self._choices = ChoiceSolver(model) if model.is_ranking else None
        self._model, self._members = model, int(config.get("members", 0))
        self._implicit = float(config.get("implicit", 0.0))
        self._penalty = config.get("penalty")
        self._part = config["dim"] // max(self._members, 1)
        units = config.get("units") or {"mean": 0.0, "spread": 1.0}
        self._sigmoid, self._spread = bool(config["sigmoid"]), float(units["spread"])
        # An exported score is ``scale`` times the learned one, plus ``shift``; factors of users and items share it.
        self._scale = np.copysign(1.0, self._spread) if self._sigmoid else self._spread
        self._shift = 0.0 if self._sigmoid else float(units["mean"])
        self._mean, self._pull = np.zeros(self._width), np.zeros(self._width)
        noise = float(config.get("train_rmse") or 1.0) ** 2
        if self._penalty is None and self._members:  # the export holds the members' mean, no member's own columns
            self._pull = np.full(self._width, noise / self._spread**2)
        elif self._penalty is None and self._choices is None:
            self._mean, self._pull = self._prior(noise)

    @property
    def _width(self) -> int:
        """Columns that are solved together: of a member, or the factors and the bias behind them."""
        return int(self._part) + (not self._members and self._model.has_biases)

    def solve(self, items: Ints, ratings: Floats) -> Folded:
        """The user with these ratings (n,) of items' rows (n,), none of them -1; there may be none.

        Of a ranking the ratings do not count, only that there are any (``fold_in_ranking``).
        """
        if self._choices is not None:
            return Folded(self._choices.solve(items), 0.0)
        model, groups = self._model, max(self._members, 1)
        root = np.sqrt(abs(self._scale) / groups)
        rows = np.asarray(model.item_embedding[items], np.float64).reshape(len(items), groups, self._part)
        rows = rows / (root * np.sign(self._scale))
        ratings = ratings if self._sigmoid else (ratings - self._shift) / self._spread
        bags = self._bags(rows)
        features, fixed = self._features(rows, bags, items)
        pull = self._pulls(len(items))
        if self._sigmoid:
            found = np.stack([self._through_sigmoid(features[g], fixed[g], ratings, pull) for g in range(groups)])
        else:
            turned = features.transpose(0, 2, 1)
            right = turned @ (ratings - fixed)[:, :, None] + (pull * self._mean)[:, None]
            found = np.asarray(np.linalg.solve(turned @ features + np.diag(pull + SMALL), right)[:, :, 0], np.float64)
        factors, biases = found[:, : self._part] + bags, np.zeros(groups)
        if self._members:
            biases = found[:, 1]
        elif model.has_biases:
            biases = found[:, self._part]
        return Folded(factors.ravel() * root, float(biases.mean() * self._scale))

    def _bags(self, rows: Floats) -> Floats:
        """What the rated items add to the factors of each group: (groups, part)."""
        total = rows.sum(axis=0) * self._implicit / np.sqrt(max(len(rows), 1))
        if self._members:
            total[:, :2] = 0  # biases and scales
        return np.asarray(total)

    def _features(self, rows: Floats, bags: Floats, items: Ints) -> tuple[Floats, Floats]:
        """What each column is multiplied by, (groups, n, columns), and what is predicted without them, (groups, n)."""
        model, count = self._model, len(rows)
        features = np.ones((rows.shape[1], count, self._width))
        features[:, :, : self._part] = rows.transpose(1, 0, 2)
        fixed = np.full((rows.shape[1], count), (model.offset - self._shift) / self._scale)
        if self._members:
            features[:, :, 1] += 1
            fixed += rows[:, :, 0].T
        elif model.item_bias is not None:
            fixed += model.item_bias[items] / self._scale
        if self._implicit:
            own = np.square(rows[:, :, 2:] if self._members else rows).sum(axis=2)
            fixed += np.einsum("ngd,gd->gn", rows, bags) - self._implicit / np.sqrt(max(count, 1)) * own.T
        return features, fixed

    def _pulls(self, count: int) -> Floats:
        """n A + L of each column."""
        if self._penalty is None:
            return self._pull
        always = six_of(self._penalty["l2"])  # exports of earlier versions hold two
        rows = self._penalty["row_l2"] or (0.0,) * 6
        pulls = np.full(self._width, count * always[0] + rows[0])
        if self._members:
            pulls[1], pulls[0] = count * always[2] + rows[2], count * always[4] + rows[4]
        elif self._model.has_biases:
            pulls[-1] = count * always[2] + rows[2]
        return pulls

    def _through_sigmoid(self, features: Floats, fixed: Floats, ratings: Floats, pull: Floats) -> Floats:
        low, high = self._model.config["sigmoid_range"]
        pull = pull * self._spread**2  # errors are ratings' here
        features, fixed = features * self._scale, fixed * self._scale

        def fit(row: Floats) -> tuple[Floats, Floats, float]:
            prediction = self._model.rating_of_score(features @ row + fixed)
            error = ratings - prediction
            return prediction, error, float(error @ error + pull @ np.square(row - self._mean))

        row = self._mean.copy()
        prediction, error, loss = fit(row)
        for _ in range(STEPS):
            slope = (prediction - low) * (high - prediction) / (high - low)
            steep = features * slope[:, None]
            gram = steep.T @ steep + np.diag(pull + SMALL)
            step = np.linalg.solve(gram, steep.T @ error - pull * (row - self._mean))
            for _ in range(HALVINGS):
                following = fit(row + step)
                if following[2] <= loss:
                    break
                step = step / 2
            else:
                return row
            row = row + step
            done = loss - following[2] <= 1e-10 * loss
            prediction, error, loss = following
            if done:
                break
        return row

    def _prior(self, noise: float) -> tuple[Floats, Floats]:
        """Mean of the trained users' columns, and noise / variance."""
        model = self._model
        step = max(1, model.num_users // SAMPLED_USERS)
        rows = np.asarray(model.user_embedding[::step], np.float64)
        if model.user_bias is not None:
            rows = np.concatenate([rows, np.asarray(model.user_bias[::step], np.float64)[:, None]], axis=1)
        rows = rows[np.abs(rows).sum(axis=1) > 0] if len(rows) else rows
        rows[:, : self._part] /= np.sqrt(abs(self._scale))
        rows[:, self._part :] /= self._scale
        if not len(rows):
            return self._mean, np.full(self._width, noise)
        return rows.mean(axis=0), noise / self._spread**2 / np.maximum(rows.var(axis=0), 1e-6)

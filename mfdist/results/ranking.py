"""How good the rankings of a model are, on the validation items of users chosen by hash, beside plain popularity::

    users = ranked_users(dataset, world)                    # some thousand users, what they like, what they have seen
    rank_metrics(partial(top_of_model, model), users, dataset, world)

Relevant is a validation item rated in the upper quarter of the scale (from 4 on 1 to 5), whose user's training items
are left out of the lists. Users are chosen by a hash of their row among those who have one, so that the sample is the
same for every model and any number of ranks, and so are the sums, which are added up in the order of the lanes.
A ranking by number of training ratings (``popularity``) stands beside the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.metrics import hash_rows, in_sample
from mfdist.results import ranking_metrics
from mfdist.results.exported_model import ExportedModel
from mfdist.results.item_lists import ItemLists
from mfdist.results.ranking_metrics import K, gains, popular
from mfdist.results.top_items import TopItems, seen_items

USERS = 5000
"""Users of a ranking that nobody asked for: its NDCG has a standard error of about 0.004."""

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Top = Callable[[Ints, int, ItemLists], Ints]
"""(user rows (users,), k, items left out of each) -> item rows (users, k), best first, -1 behind the last."""


class RankedUsers(NamedTuple):
    """This rank's part of the users that rankings are measured on, in the order of its lanes."""

    users: Ints
    """Their rows (users,)."""
    relevant: ItemLists
    seen: ItemLists
    lane_ends: Ints
    """Of each lane of this rank, one past its last user here."""
    threshold: float
    """The lowest rating of a relevant item."""
    of_users: int
    """Users with a relevant item, on all ranks."""


def ranked_users(
    dataset: Dataset, world: World, num_users: int = USERS, *, seed: int = 0, sample: float = 1.0
) -> RankedUsers:
    """About ``num_users`` users with a relevant item (all, where there are no more); collective.

    ``sample``: only users of this sample (``metrics.in_sample``). Two passes over the validation rows and one over the
    training rows; in memory are the items of the chosen users.
    """
    low, high = dataset.manifest.rating_scale
    threshold = low + 0.75 * (high - low)
    lanes = lanes_of_rank(len(dataset.manifest.lanes), world.rank, world.size)
    mine = sum(len(np.unique(_pairs(dataset, lane, threshold, sample)[:, 0])) for lane in lanes)
    of_users = int(world.sum([mine])[0])
    fraction = num_users / max(1, of_users)
    found = [(np.empty(0, np.int64), ItemLists.none(0), ItemLists.none(0))]
    for lane in lanes:
        rows = np.unique(_pairs(dataset, lane, threshold, sample, fraction, seed), axis=0)
        users, starts = np.unique(rows[:, 0], return_index=True)
        liked = ItemLists(np.append(starts, len(rows)).astype(np.int64), rows[:, 1])
        seen = seen_items(dataset, lane, users) if len(users) else ItemLists.none(0)
        found.append((users, liked, seen))
    users_of, liked_of, seen_of = zip(*found, strict=True)
    ends = np.cumsum([len(users) for users in users_of[1:]], dtype=np.int64)
    liked, seen = ItemLists.concatenated(liked_of), ItemLists.concatenated(seen_of)
    return RankedUsers(np.concatenate(users_of), liked, seen, ends, threshold, of_users)


def rank_metrics(top: Top, chosen: RankedUsers, dataset: Dataset, world: World) -> dict[str, Any]:
    """``{"users", "of_users", "threshold", "ndcg@10", "recall@10", "mrr@10", "coverage@10", "popularity": {...}}``;
    figures are None where there is no user. Collective; ``top`` may be collective too."""
    lists = top(chosen.users, K, chosen.seen), popular(dataset.counts("items"), chosen.seen, K)
    values = np.concatenate([np.ones((len(chosen.users), 1)), *(gains(f, chosen.relevant) for f in lists)], axis=1)
    cuts = zip(np.append(0, chosen.lane_ends)[:-1], chosen.lane_ends, strict=True)
    sums = [values[first:end].sum(axis=0) for first, end in cuts]
    covered = [np.unique(found[found >= 0]) for found in lists]
    gathered = world.gather((sums, covered))
    totals = np.sum([row for part, _ in gathered for row in part], axis=0)
    own, popularity = (
        ranking_metrics.figures(totals[1 + 3 * k : 4 + 3 * k], totals[0],
                                len(np.unique(np.concatenate([part[k] for _, part in gathered]))),
                                dataset.manifest.num_items)
        for k in range(2)
    )  # fmt: skip
    about = {"users": int(totals[0]), "of_users": chosen.of_users, "threshold": chosen.threshold}
    return {**about, **own, "popularity": popularity}


def top_of_model(model: ExportedModel, users: Ints, k: int, hidden: ItemLists) -> Ints:
    """The lists of an exported model whose rows are the dataset's: a :data:`Top` of its first argument."""
    return TopItems(model).of(users, k, hidden)[0]


def chosen_by_hash(user: Array, seed: int) -> Floats:
    """A number in [0, 1) of each user row, by a hash of row and seed."""
    return hash_rows(user, 0, seed) / 2.0**64


def _pairs(dataset: Dataset, lane: int, threshold: float, sample: float, fraction: float = 1.0, seed: int = 0) -> Ints:
    """(rows, 2) of users and relevant validation items of a lane, of the users whose number is below ``fraction``."""
    pairs = [np.empty((0, 2), np.int64)]
    for _, user, item, rating, _ in scan(dataset, "val", range(lane, lane + 1)):
        keep = (rating >= threshold) & in_sample(user, sample)
        if fraction < 1:
            keep &= chosen_by_hash(user, seed) < fraction
        pairs.append(np.stack([user[keep], item[keep]], axis=1).astype(np.int64))
    return np.concatenate(pairs)

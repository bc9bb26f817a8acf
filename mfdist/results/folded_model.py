"""A model with users added, or their rows replaced, by what they rated after training (see ``fold_in``)::

    model, parts = fold_in_files(config, model, find_dataset, world, console)     # predicts as any other

A known user's training ratings count as well, but those of items rated anew; they are read from the run's dataset.
Users are cut into segments, known ones lane by lane; each segment is a part that one rank solves and that stays beside
the output until that is there (see ``part_files``), so that a stop loses none. The solved rows are held by every rank,
4 (dim + 1) bytes a user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.log import Console
from mfdist.results.exported_model import ExportedModel
from mfdist.results.fold_in import FoldIn, with_training
from mfdist.results.item_lists import ItemLists
from mfdist.results.new_ratings import NewRatings, read_new_ratings
from mfdist.results.part_files import Parts, Write, check, stoppable
from mfdist.run.stopping import StopWatch

SEGMENT_USERS = 1 << 15
BATCH_USERS = 512

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class FoldedModel(ExportedModel):
    """``model`` where the users of ``new`` have the rows ``factors`` (users, dim) and ``bias`` (users,)."""

    def __init__(
        self, model: ExportedModel, new: NewRatings, factors: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]
    ) -> None:
        biases = {"user_bias": model.user_bias, "item_bias": model.item_bias, "offset": np.array([model.offset])}
        tensors = {"user_embedding": model.user_embedding, "item_embedding": model.item_embedding,
                   **{name: values for name, values in biases.items() if values is not None}}  # fmt: skip
        super().__init__(model.run, model.folder, model.config, tensors)
        self._base, self.new, self._factors, self._bias = model, new, factors, bias

    @property
    def num_users(self) -> int:
        return self._base.num_users + len(self.new.new_ids)

    def users(self, rows: Any) -> tuple[npt.NDArray[np.float32], Floats]:
        factors, bias = self._base.users(np.where(rows < self._base.num_users, rows, -1))
        place = np.minimum(np.searchsorted(self.new.users, rows), len(self.new.users) - 1)
        folded = np.flatnonzero(self.new.users[place] == rows)
        factors[folded], bias[folded] = self._factors[place[folded]], self._bias[place[folded]]
        return factors, bias

    def ids(self, side: str, first: int = 0, end: int | None = None) -> pa.ChunkedArray:
        if side != "users":
            return self._base.ids(side, first, end)
        count = self._base.num_users
        end = self.num_users if end is None else end
        known = self._base.ids(side, min(first, count), min(end, count)).chunks
        return pa.chunked_array([*known, self.new.new_ids[max(first - count, 0) : max(end - count, 0)]], pa.string())

    def rows_of(self, side: str, ids: Sequence[str] | pa.Array) -> Ints:
        rows = self._base.rows_of(side, ids)
        if side == "users" and (rows < 0).any() and len(self.new.new_ids):
            import pyarrow.compute as pc

            place = pc.fill_null(pc.index_in(pa.array(ids, pa.string()), value_set=self.new.new_ids), -1).to_numpy()
            rows = np.where((rows < 0) & (place >= 0), self._base.num_users + place, rows)
        return rows

    def rated_since(self, rows: Ints) -> ItemLists:
        """The items that users have rated after training; ``rows`` ascending."""
        place = np.minimum(np.searchsorted(self.new.users, rows), len(self.new.users) - 1)
        mine = np.flatnonzero(self.new.users[place] == rows)
        lists = self.new.items.of(place[mine])
        return ItemLists.of_pairs(mine[lists.users], lists.items, len(rows))


class FoldInFlags(Protocol):
    """The flags of a job that folds in; ``fold_in`` None: nothing."""

    @property
    def fold_in(self) -> tuple[str, ...] | None: ...
    @property
    def fold_in_columns(self) -> tuple[str, ...] | None: ...
    @property
    def max_rejected(self) -> float: ...
    @property
    def out(self) -> str: ...


class Segment(NamedTuple):
    """Places in ``NewRatings.users`` that are solved together, of one lane, or of new ids (None)."""

    places: Ints
    lane: int | None


def fold_in_files(
    flags: FoldInFlags, model: ExportedModel, find_dataset: Callable[[], Dataset], world: World, console: Console
) -> tuple[ExportedModel, Parts | None]:
    """The model with the users of ``--fold-in``, and the parts to remove when ``out`` is there. Collective.

    ``find_dataset`` is called where known users have new ratings. DataError as in ``read_new_ratings``; StopRequested
    where a signal asks for it.
    """
    if not flags.fold_in:
        return model, None
    with stoppable(world, flags.out) as watch:
        new = read_new_ratings(flags.fold_in, flags.fold_in_columns, flags.max_rejected, model, console, watch)
    dataset = find_dataset() if (new.users < model.num_users).any() else None
    segments, solver = _segments(new, model.num_users, dataset), FoldIn(model)
    request = {"job": "fold-in", "model": model.identity(), "ratings": new.checksum}
    fields = [("row", pa.int64()), ("factors", pa.list_(pa.float32(), model.config["dim"])), ("bias", pa.float32())]
    parts = Parts(f"{flags.out.rstrip('/')}.folded", pa.schema(fields), request, world, ending="")
    todo = [number for number in range(len(segments)) if number not in parts.finished]
    done = len(new.users) - sum(len(segments[number].places) for number in todo)
    with console.progress("fold-in", len(new.users), done, unit="users") as progress:

        def make(number: int, write: Write, watch: StopWatch) -> None:
            segment = segments[number]
            old = ratings_of(dataset, segment.lane, new.users[segment.places]) if segment.lane is not None else None
            for table in _solved(solver, new, segment, old, parts.schema):
                write(table)
                progress.advance(len(table) * world.size)
                check(watch)

        parts.make(todo[world.rank :: world.size], make)
    world.barrier()
    factors, bias = np.empty((len(new.users), model.config["dim"]), np.float32), np.empty(len(new.users), np.float32)
    for table in parts.tables(len(segments)):
        place = np.searchsorted(new.users, table["row"].to_numpy())
        factors[place] = table["factors"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        bias[place] = table["bias"].to_numpy()
    return (FoldedModel(model, new, factors, bias) if len(new.users) else model), parts


def ratings_of(dataset: Dataset | None, lane: int, users: Ints) -> tuple[ItemLists, npt.NDArray[np.float32]]:
    """Training items and ratings of ``users`` (ascending rows of one lane), from one pass over the lane's files."""
    assert dataset is not None
    places, items, ratings = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for _, user, item, rating, _ in scan(dataset, "train", range(lane, lane + 1)):
        place = np.minimum(np.searchsorted(users, user), len(users) - 1)
        hits = np.flatnonzero(users[place] == user)
        places.append(place[hits].astype(np.int64))
        items.append(item[hits].astype(np.int64))
        ratings.append(rating[hits])
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(users)))])
    return ItemLists(starts.astype(np.int64), np.concatenate(items)[order]), np.concatenate(ratings)[order]


def _segments(new: NewRatings, num_known: int, dataset: Dataset | None) -> list[Segment]:
    """The same for any number of ranks."""
    found: list[Segment] = []
    known = int(np.searchsorted(new.users, num_known))
    for lane, about in enumerate(dataset.manifest.lanes if dataset is not None else ()):
        ranges = [np.arange(*np.searchsorted(new.users, edges)) for edges in about.user_ranges]
        places = np.concatenate([np.empty(0, np.int64), *ranges])
        found += [Segment(np.sort(places), lane)] if len(places) else []
    return found + [Segment(np.arange(first, min(first + SEGMENT_USERS, len(new.users))), None)
                    for first in range(known, len(new.users), SEGMENT_USERS)]  # fmt: skip


def _solved(
    solver: FoldIn, new: NewRatings, segment: Segment, old: tuple[ItemLists, npt.NDArray[np.float32]] | None,
    schema: pa.Schema,
) -> Iterator[pa.Table]:  # fmt: skip
    """Rows of a segment, a batch at a time."""
    for first in range(0, len(segment.places), BATCH_USERS):
        batch = range(first, min(first + BATCH_USERS, len(segment.places)))
        solved = []
        for number in batch:
            place = segment.places[number]
            mine = slice(new.items.starts[place], new.items.starts[place + 1])
            items, ratings = new.items.items[mine], new.ratings[mine].astype(np.float64)
            if old is not None:
                before = slice(old[0].starts[number], old[0].starts[number + 1])
                items, ratings = with_training(old[0].items[before], old[1][before], items, ratings)
            solved.append(solver.solve(items, ratings))
        factors = np.array([one.factors for one in solved], np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(factors.ravel()), factors.shape[1])
        bias = pa.array([one.bias for one in solved], pa.float32())
        yield pa.table([pa.array(new.users[segment.places[batch.start : batch.stop]]), column, bias], schema=schema)

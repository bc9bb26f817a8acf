"""Top items of users, as a file: user_id, item_id, rank (from 1), score (predicted rating), by user and rank.

Users come in the order of their row numbers, and are cut into segments, each a part of the output that one rank makes
(see ``part_files``). Where seen items are left out a segment is a lane's range of users, so that one pass over the lane
gives what its users have seen. Example: 5 segments over 2 ranks: rank 0 makes parts 0, 2, 4, rank 1 parts 1, 3.

A user id outside the vocabulary, last in the output in the order of the file, gets the items by bias (its own
embedding and bias count as zero). mf has nothing to rank by for such a user: that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.config import flag
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.prepare.columns import parse_rating_columns
from mfdist.results.exported_model import ExportedModel
from mfdist.results.folded_model import FoldedModel, fold_in_files
from mfdist.results.id_files import read_ids
from mfdist.results.item_filters import ItemFilters
from mfdist.results.item_lists import ItemLists
from mfdist.results.part_files import Parts, Write, check, checksum_of, ending_of, stoppable
from mfdist.results.recommendation_table import SCHEMA, refuse_unknown, table_of
from mfdist.results.top_items import TopItems, seen_items
from mfdist.results.trained_on import check_dataset, dataset_of_model
from mfdist.run.stopping import StopWatch

SEGMENT_ROWS = 1 << 16
BATCH_USERS = 1 << 14

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Flags of jobs/recommend.py."""

    run_dir: str = flag("", "run directory with an exported model (required)")
    out: str = flag("", "file to write, .parquet or .csv, or a folder of Parquet parts (a name without an ending); required")  # fmt: skip # noqa: E501
    top_k: int = flag(10, "items for each user", at_least=1)
    users: str = flag(
        "all", "all, folded (those of --fold-in alone), or a file of user ids: text with one a line, or Parquet with a "
        "column user_id"
    )  # fmt: skip
    include_seen: bool = flag(False, "also items that the user has rated in the training rows")
    allow: str | None = flag(
        None, "file of the only items to recommend: item ids, or user_id,item_id for the users named there"
    )
    deny: str | None = flag(None, "file of items to leave out: item ids, or user_id,item_id for one user each")
    min_item_ratings: int = flag(0, "leave out items with fewer training ratings", at_least=0)
    unknown_users: str = flag(
        "bias", "ids of --users that training did not know: items by bias, left out, or refused",
        choices=("bias", "skip", "error"),
    )  # fmt: skip
    fold_in: tuple[str, ...] | None = flag(
        None, "files of ratings since training: their users get rows solved from them (and from training's)", many=True
    )
    fold_in_columns: tuple[str, ...] | None = flag(
        None, "user,item,rating of --fold-in: names, or positions from 0", parse=parse_rating_columns
    )
    max_rejected: float = flag(0.01, "share of --fold-in's rows that may be refused", at_least=0.0, at_most=1.0)
    data: str | None = flag(None, "dataset directory of seen items and rating counts, where it has moved")
    device: str = flag("auto", "device of the products", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name in ("run_dir", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is missing. See recommend.py --help.")
        ending_of(self.out)
        if self.users == "folded" and not self.fold_in:
            raise UsageError("--users folded means the users of --fold-in; give that, too.")

    @property
    def needs_dataset(self) -> bool:
        """Known users of ``--fold-in`` need it, too; whether there are any only reading tells."""
        return not self.include_seen or self.min_item_ratings > 0


class Segment(NamedTuple):
    """Wanted user rows, ascending, of one lane (of any where lane is None); -1 for ids not in the vocabulary."""

    users: Ints
    ids: Sequence[str] | None
    lane: int | None


class Recommended(NamedTuple):
    """Users that were given items, and how many of the users asked for training did not know."""

    users: int
    unknown: int


def recommend(
    config: RecommendConfig, world: World, dataset: Dataset | None, console: Console | None = None
) -> Recommended:
    """Write the recommendations; collective. ``dataset``: only where the flags need it.

    StopRequested where a signal asks for it: finished parts stay, and the same call goes on with the others.
    """
    console = console or Console(False)
    with stoppable(world, config.out):
        with console.busy("opening the model"):
            exported = ExportedModel.open(config.run_dir)
            if dataset is not None:
                check_dataset(exported, dataset)
        model, folding = fold_in_files(
            config, exported, lambda: dataset or dataset_of_model(exported, config.data), world, console
        )
        rows, unknown, num_unknown = _wanted(config, model)
        filters = ItemFilters(config.allow, config.deny, config.min_item_ratings, model, dataset, unknown)
        for line in filters.remarks:
            console.warn(line)
        lanes = dataset if not config.include_seen else None
        segments = _segments(model, lanes, rows, unknown)
        parts = Parts(config.out, SCHEMA, _request(config, model, rows, unknown, filters), world)
        todo = [number for number in range(len(segments)) if number not in parts.finished]
        with console.busy("sorting the items for the search"):
            top = TopItems(model, rows=filters.rows, device=world.device) if todo else None
    total = sum(len(segment.users) for segment in segments)
    done = total - sum(len(segments[number].users) for number in todo)
    if done:
        console.info(f"{done:,} of {total:,} users are there already")

    with console.progress("recommend", total, done, unit="users") as progress:

        def make(number: int, write: Write, watch: StopWatch) -> None:
            assert top is not None
            for table, users in _tables(model, top, segments[number], config.top_k, lanes, filters):
                write(table)
                progress.advance(users * world.size)
                check(watch)

        parts.make(todo[world.rank :: world.size], make)
    with console.busy("joining the parts"):
        parts.join(len(segments))
    if folding is not None:
        folding.remove()
    return Recommended(total, num_unknown)


def _request(
    config: RecommendConfig, model: ExportedModel, rows: Ints | None, unknown: Sequence[str], filters: ItemFilters
) -> dict[str, Any]:
    flags = {key: value for key, value in asdict(config).items() if key not in ("device", "data", "run_dir", "out")}
    wanted = None if rows is None else [checksum_of(rows), *unknown]
    added = model.new.checksum if isinstance(model, FoldedModel) else None
    return {**flags, "job": "recommend", "model": model.identity(), "wanted": wanted, "filters": filters.identity,
            "added": added}  # fmt: skip


# Which users, and whose they are ------------------------------------------------------------------


def _wanted(config: RecommendConfig, model: ExportedModel) -> tuple[Ints | None, list[str], int]:
    """Ascending rows of users (None: all), the ids without one that get items by bias, and how many have none."""
    if config.users == "all":
        return None, [], 0
    if config.users == "folded":
        return (model.new.users if isinstance(model, FoldedModel) else np.empty(0, np.int64)), [], 0
    names = read_ids(config.users, "users", "user_id")
    rows = model.rows_of("users", names)
    unknown = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    if unknown and config.unknown_users == "error":
        raise UsageError(f"{len(unknown)} of the {len(names)} users of --users {storage.redact(config.users)} were not "
                         f"known to training (the first: '{unknown[0]}'). Take them out, or give --unknown-users "
                         "skip.")  # fmt: skip
    served = [] if config.unknown_users == "skip" else unknown
    refuse_unknown(model, served)
    return np.sort(rows[rows >= 0]), served, len(unknown)


def _segments(
    model: ExportedModel, dataset: Dataset | None, wanted: Ints | None, unknown: Sequence[str]
) -> list[Segment]:
    """All wanted users in order; the same on every rank and for any number of ranks."""
    if dataset is None:
        ranges = [(first, min(first + SEGMENT_ROWS, model.num_users), None)
                  for first in range(0, model.num_users, SEGMENT_ROWS)]  # fmt: skip
    else:
        ranges = sorted((first, end, number) for number, lane in enumerate(dataset.manifest.lanes)  # type: ignore[misc]
                        for first, end in lane.user_ranges)  # fmt: skip
        ranges += [(first, min(first + SEGMENT_ROWS, model.num_users), None)
                   for first in range(dataset.manifest.num_users, model.num_users, SEGMENT_ROWS)]  # fmt: skip
    if wanted is None:
        return [Segment(np.arange(first, end), None, lane) for first, end, lane in ranges if end > first]
    segments = []
    for first, end, lane in ranges:
        users = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, end)]
        if len(users):
            segments.append(Segment(users, None, lane))
    return [*segments, *([Segment(np.full(len(unknown), -1), unknown, None)] if unknown else [])]


# Writing ------------------------------------------------------------------------------------------


def _tables(
    model: ExportedModel, top: TopItems, segment: Segment, k: int, dataset: Dataset | None, filters: ItemFilters
) -> Iterator[tuple[pa.Table, int]]:
    """Tables of a segment, each with its number of users."""
    ids = segment.ids if segment.ids is not None else _ids_between(model, segment.users)
    seen = _seen(model, segment, dataset)
    for first in range(0, len(segment.users), BATCH_USERS):
        batch = slice(first, min(first + BATCH_USERS, len(segment.users)))
        users = segment.users[batch]
        keys = users if segment.ids is None else model.num_users + np.arange(batch.start, batch.stop)
        items, ratings = filters.top(top, users, keys, k, None if seen is None else seen.cut(batch))
        yield table_of(model, pa.array(ids[batch], pa.string()), items, ratings), len(users)


def _seen(model: ExportedModel, segment: Segment, dataset: Dataset | None) -> ItemLists | None:
    """What the users of a segment have rated, in training and since; None where all may be recommended."""
    if dataset is None:
        return None
    seen = ItemLists.none(len(segment.users))
    if segment.lane is not None:
        seen = seen_items(dataset, segment.lane, segment.users)
    return seen.joined(model.rated_since(segment.users)) if isinstance(model, FoldedModel) else seen


def _ids_between(model: ExportedModel, users: Ints) -> Any:
    first = int(users[0])
    return model.ids("users", first, int(users[-1]) + 1).combine_chunks().take(pa.array(users - first))

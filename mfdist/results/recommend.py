"""Top items of users, streamed to Parquet: user_id, item_id, rank (from 1), score (predicted rating), by user and rank.

Users come in the order of their row numbers. Their rows are cut into segments (with --exclude-seen a lane's ranges, so
that one pass over a lane gives what its users have seen); ranks take consecutive segments and write a part each:

    5 segments over 2 ranks: rank 0 writes segments 0, 1, 2 to part 0, rank 1 writes 3, 4 to part 1; OUT is 0 then 1

A user id outside the vocabulary, last in the output in the order of the file, gets the items by bias (its own
embedding and bias count as zero). mf has nothing to rank by for such a user: that is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.config import flag
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.results.export import ExportedModel
from mfdist.results.top_items import TopItems, seen_items
from mfdist.results.trained_on import check_dataset

SEGMENT_ROWS = 1 << 16
BATCH_USERS = 4096
SCHEMA = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Flags of jobs/recommend.py."""

    run_dir: str = flag("", "run directory with an exported model (required)")
    out: str = flag("", "Parquet file to write, or a folder for one part a rank where it does not end in .parquet (required)")  # fmt: skip # noqa: E501
    top_k: int = flag(10, "items for each user", at_least=1)
    users: str = flag("all", "all, or a file of user ids: text with one a line, or Parquet with a column user_id")
    exclude_seen: bool = flag(False, "leave out the items that the user has rated in the training rows")
    data: str | None = flag(None, "dataset directory for --exclude-seen, where it has moved since training")
    device: str = flag("auto", "device of the matrix products", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name in ("run_dir", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is missing. See recommend.py --help.")


class Segment(NamedTuple):
    """Wanted user rows, ascending, of one lane (of any where lane is None); -1 for ids not in the vocabulary."""

    users: Ints
    ids: Sequence[str] | None
    lane: int | None


def recommend(config: RecommendConfig, world: World, dataset: Dataset | None) -> int:
    """Write the recommendations and return the number of users; collective. ``dataset``: only for --exclude-seen."""
    model = ExportedModel.open(config.run_dir)
    if dataset is not None:
        check_dataset(model, dataset)
    segments = _segments(model, dataset, _wanted(config, model))
    mine = _share([len(segment.users) for segment in segments], world.rank, world.size)
    top = TopItems(model, device=world.device)
    single = config.out.endswith(".parquet")
    part = (
        f"{config.out}.part-{world.rank:05d}" if single else storage.join(config.out, f"part-{world.rank:05d}.parquet")
    )
    if not single and world.is_main:
        _remove_parts(config.out)
    world.barrier()
    try:
        with storage.open_write(part) as stream, pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
            for number in mine:
                for table in _tables(model, top, segments[number], config.top_k, dataset):
                    writer.write_table(table)
        world.barrier()
        if single and world.is_main:
            _join_parts(config.out, world.size)
        world.barrier()
    finally:
        if single:
            storage.remove(part)
    return sum(len(segment.users) for segment in segments)


def table_of(model: ExportedModel, user_ids: pa.Array, items: Ints, ratings: npt.NDArray[np.float64]) -> pa.Table:
    """Rows user_id, item_id, rank, score of top_items' (users, k) results, without the places that have no item."""
    kept = np.flatnonzero(items.ravel() >= 0)
    k = items.shape[1]
    chosen, place = np.unique(items.ravel()[kept], return_inverse=True)
    item_ids = _ids_of_rows(model, chosen).take(pa.array(place))
    rank = (kept % k + 1).astype(np.int32)
    score = ratings.ravel()[kept].astype(np.float32)
    return pa.table([user_ids.take(pa.array(kept // k)), item_ids, rank, score], schema=SCHEMA)


def read_user_ids(path: str) -> list[str]:
    """User ids of a file, each once, in its order; UsageError where there is none."""
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise UsageError(f"--users {storage.redact(path)}: there is no such file.") from None
    try:
        ids = _parquet_ids(content) if content[:4] == b"PAR1" else content.decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise UsageError(f"--users {storage.redact(path)} is neither text nor Parquet ({error}).") from None
    found = list(dict.fromkeys(name for name in ids if name))
    if not found:
        raise UsageError(f"--users {storage.redact(path)} has no user ids.")
    return found


def refuse_unknown(model: ExportedModel, unknown: Sequence[str]) -> None:
    """UsageError for ids outside the vocabulary of a model that has nothing to rank items by for them."""
    if unknown and not model.has_biases:
        raise UsageError(
            f"{len(unknown)} of the users are not in the vocabulary of {storage.redact(model.run)} (the first: "
            f"'{unknown[0]}'), and {model.config['model']} without biases cannot rank items for them. Leave them out, "
            "or use a model with biases."
        )


# Which users, and whose they are ------------------------------------------------------------------


def _wanted(config: RecommendConfig, model: ExportedModel) -> tuple[Ints, list[str]] | None:
    """Ascending known rows and unknown ids of --users; None for all users."""
    if config.users == "all":
        return None
    names = read_user_ids(config.users)
    rows = model.rows_of("users", names)
    unknown = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    refuse_unknown(model, unknown)
    return np.sort(rows[rows >= 0]), unknown


def _segments(model: ExportedModel, dataset: Dataset | None, wanted: tuple[Ints, list[str]] | None) -> list[Segment]:
    """All wanted users in order; the same on every rank and for any number of ranks."""
    if dataset is None:
        ranges = [(first, min(first + SEGMENT_ROWS, model.num_users), None)
                  for first in range(0, model.num_users, SEGMENT_ROWS)]  # fmt: skip
    else:
        ranges = sorted((first, end, number) for number, lane in enumerate(dataset.manifest.lanes)  # type: ignore[misc]
                        for first, end in lane.user_ranges)  # fmt: skip
    if wanted is None:
        return [Segment(np.arange(first, end), None, lane) for first, end, lane in ranges]
    rows, unknown = wanted
    segments = []
    for first, end, lane in ranges:
        users = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)]
        if len(users):
            segments.append(Segment(users, None, lane))
    return [*segments, *([Segment(np.full(len(unknown), -1), unknown, None)] if unknown else [])]


def _share(sizes: Sequence[int], rank: int, world_size: int) -> range:
    """The consecutive segments of a rank, cut so that ranks have about as many users each."""
    ends = np.cumsum([0, *sizes])
    targets = [ends[-1] * place / world_size for place in (rank, rank + 1)]
    middle = (ends[:-1] + ends[1:]) / 2
    first, end = (int(np.searchsorted(middle, target)) for target in targets)
    return range(first, len(sizes) if rank == world_size - 1 else end)


# Writing ------------------------------------------------------------------------------------------


def _tables(
    model: ExportedModel, top: TopItems, segment: Segment, k: int, dataset: Dataset | None
) -> Iterator[pa.Table]:
    if not len(segment.users):
        return
    ids = segment.ids if segment.ids is not None else _ids_between(model, segment.users)
    seen = None
    if dataset is not None and segment.lane is not None:
        seen = seen_items(dataset, segment.lane, segment.users)
    for first in range(0, len(segment.users), BATCH_USERS):
        batch = slice(first, min(first + BATCH_USERS, len(segment.users)))
        users = segment.users[batch]
        items, ratings = top.of(users, k, None if seen is None else seen.cut(batch))
        yield table_of(model, pa.array(ids[batch], pa.string()), items, ratings)


def _ids_between(model: ExportedModel, users: Ints) -> Any:
    first = int(users[0])
    return model.ids("users", first, int(users[-1]) + 1).combine_chunks().take(pa.array(users - first))


def _ids_of_rows(model: ExportedModel, rows: Ints) -> pa.Array:
    """Item ids of ascending rows."""
    if not len(rows):
        return pa.array([], pa.string())
    return model.ids("items", int(rows[0]), int(rows[-1]) + 1).combine_chunks().take(pa.array(rows - rows[0]))


def _join_parts(out: str, size: int) -> None:
    """The parts, in rank order, a row group at a time, as one file."""
    with storage.open_write(out) as stream, pq.ParquetWriter(stream, SCHEMA, compression="zstd") as writer:
        for rank in range(size):
            fs, inner = storage.arrow_filesystem(f"{out}.part-{rank:05d}")
            with pq.ParquetFile(inner, filesystem=fs) as file:
                for group in range(file.metadata.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def _remove_parts(folder: str) -> None:
    for name in storage.list_names(folder):
        if name.startswith("part-") and name.endswith(".parquet"):
            storage.remove(storage.join(folder, name))


def _parquet_ids(content: bytes) -> list[str]:
    table = pq.read_table(io.BytesIO(content))
    column = table["user_id"] if "user_id" in table.column_names else table.column(0)
    return [str(name) for name in column.to_pylist() if name is not None]

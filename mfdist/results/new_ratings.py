"""Files of ratings that came after training, read a piece at a time: whose they are, of what, and how many stars.

A user whom training did not know gets a row behind the model's, in the order of first appearance. A row of an item that
training did not know tells nothing of its user: it is counted and left out. Held are 12 bytes a rating, and 36 while
they are sorted by user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.columns import recognise
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Rules
from mfdist.prepare.sources import Source
from mfdist.results.block_ids import texts_of
from mfdist.results.exported_model import ExportedModel
from mfdist.results.item_lists import ItemLists
from mfdist.results.part_files import check
from mfdist.run.stopping import StopWatch

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NewRatings:
    """``users``: ascending rows of those who rated, of new ids from ``model.num_users`` on; ``items`` their lists, in
    the order of the files, and ``ratings`` of the same places; ``new_ids`` the ids behind the model's."""

    users: Ints
    items: ItemLists
    ratings: Floats32
    new_ids: pa.Array
    unknown_items: int
    checksum: list[Any]


def read_new_ratings(
    patterns: Sequence[str], columns: tuple[str, ...] | None, max_rejected: float, model: ExportedModel,
    console: Console, watch: StopWatch,
) -> NewRatings:  # fmt: skip
    """Read them all. DataError where a file is none, or more than ``max_rejected`` of the rows are refused; Interrupted
    where the job should stop."""
    sources, reader = find_sources(tuple(patterns)), _Reader(model, watch)
    with console.progress("fold-in", sum(source.bytes for source in sources), unit="bytes") as progress:
        for source in sources:
            reader.read(source, columns)
            progress.advance(source.bytes)
    if reader.refused > max_rejected * max(reader.rows + reader.refused, 1):
        raise DataError(f"{reader.refused:,} of {reader.rows + reader.refused:,} rows of --fold-in were refused, more "
                        f"than --max-rejected {max_rejected:g} allows, for example {reader.example}.")  # fmt: skip
    if reader.refused:
        console.warn(f"{reader.refused:,} rows of --fold-in were refused, for example {reader.example}")
    if reader.unknown_items:
        console.warn(f"{reader.unknown_items:,} of {reader.rows:,} rows of --fold-in are of items that training did "
                     "not know, and are left out")  # fmt: skip
    checksum = [[source.shown, source.bytes, storage.version(source.path) if "::" not in source.path else ""]
                for source in sources]  # fmt: skip
    return reader.sorted_by_user([checksum, columns])


@dataclass
class _Reader:
    model: ExportedModel
    watch: StopWatch
    rows: int = 0
    refused: int = 0
    unknown_items: int = 0
    example: str = ""
    new: dict[str, int] = field(default_factory=dict)
    pieces: list[tuple[Ints, npt.NDArray[np.int32], Floats32]] = field(default_factory=list)

    def read(self, source: Source, columns: tuple[str, ...] | None) -> None:
        try:
            layout = recognise(source, columns).without_time()
        except (DataError, UsageError) as error:
            raise type(error)(str(error).replace("--columns", "--fold-in-columns")) from None
        for piece in chunks(source, layout):
            if isinstance(piece, str):
                return
            check(self.watch)
            block = parse(piece, layout, Rules(0, None, False))
            self.rows += len(block.rating)
            self.refused += len(block.rejects)
            if block.rejects and not self.example:
                _, reason, text = block.rejects[0]
                self.example = f"{source.shown}: {reason}: {text[:80]!r}"
            items = self.model.rows_of("items", texts_of(block, 1))
            users = self._users(texts_of(block, 0))
            known = items >= 0
            self.unknown_items += int((~known).sum())
            self.pieces.append((users[known], items[known].astype(np.int32), block.rating[known]))

    def _users(self, ids: pa.Array) -> Ints:
        """Rows of users; ids seen for the first time get the next ones."""
        coded = ids.dictionary_encode()
        names = coded.dictionary
        rows = self.model.rows_of("users", names)
        for place in np.flatnonzero(rows < 0).tolist():
            rows[place] = self.model.num_users + self.new.setdefault(names[place].as_py(), len(self.new))
        return np.asarray(rows[coded.indices.to_numpy()])

    def sorted_by_user(self, checksum: list[Any]) -> NewRatings:
        user = np.concatenate([np.empty(0, np.int64), *(piece[0] for piece in self.pieces)])
        item = np.concatenate([np.empty(0, np.int32), *(piece[1] for piece in self.pieces)])
        rating = np.concatenate([np.empty(0, np.float32), *(piece[2] for piece in self.pieces)])
        self.pieces = []
        order = np.argsort(user, kind="stable")
        new = np.arange(self.model.num_users, self.model.num_users + len(self.new))
        # also those all of whose items are unknown: they are asked for, and get what can be said of anybody
        users, counts = np.unique(np.concatenate([user, new]), return_counts=True)
        counts -= users >= self.model.num_users
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return NewRatings(users, ItemLists(starts, item[order].astype(np.int64)), rating[order],
                          pa.array(list(self.new), pa.string()), self.unknown_items, checksum)  # fmt: skip

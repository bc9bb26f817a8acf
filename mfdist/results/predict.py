"""Files of pairs in, the same pairs with prediction, known_user and known_item beside out.

Columns: user_id, item_id[, rating], prediction, known_user, known_item.

Pairs are read as preparation reads ratings (``prepare.readers``), in the order of the sources, a piece at a time. So
many pieces make a part of the output (see ``part_files``); every rank reads all pieces and parses those of its parts.
Where ratings stand beside, the errors are summed up part by part, in the order of the parts, so that they too are the
same on any number of ranks, and after a stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.config import flag, positional
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.columns import parse_pair_columns, parse_rating_columns, recognise
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.layout import Layout
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.sources import Source
from mfdist.results.block_ids import texts_of
from mfdist.results.exported_model import ExportedModel
from mfdist.results.folded_model import FoldedModel, fold_in_files
from mfdist.results.part_files import Parts, Write, check, ending_of
from mfdist.results.trained_on import dataset_of_model
from mfdist.run.stopping import StopWatch

PIECES = 8
"""Pieces of a part: 32 MB of text or a million rows of Parquet."""
EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Flags of jobs/predict.py."""

    pairs: tuple[str, ...] = positional("files, globs, folders or URLs of pairs: user, item and, where known, rating")
    run_dir: str = flag("", "run directory with an exported model (required)")
    out: str = flag("", "file to write, .parquet or .csv, or a folder of Parquet parts (a name without an ending); required")  # fmt: skip # noqa: E501
    columns: tuple[str, ...] | None = flag(
        None, "user,item[,rating]: names, or positions from 0 for headerless files", parse=parse_pair_columns
    )
    fold_in: tuple[str, ...] | None = flag(
        None, "files of ratings since training: their users get rows solved from them (and from training's)", many=True
    )
    fold_in_columns: tuple[str, ...] | None = flag(
        None, "user,item,rating of --fold-in: names, or positions from 0", parse=parse_rating_columns
    )
    data: str | None = flag(None, "dataset directory of training ratings that --fold-in adds to, where it has moved")
    max_rejected: float = flag(0.01, "share of the rows that may be refused", at_least=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        for name in ("run_dir", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is missing. See predict.py --help.")
        ending_of(self.out)


class Predicted(NamedTuple):
    """Rows written, refused, with an unknown user, with an unknown item; errors None where no rating stood beside."""

    rows: int
    rejected: int
    unknown_user: int
    unknown_item: int
    rmse: float | None
    mae: float | None


def predict(config: PredictConfig, world: World, console: Console | None = None) -> Predicted:
    """Write the predictions; collective. DataError where too many rows are refused; StopRequested as in recommend."""
    console = console or Console(False)
    with console.busy("opening the model"):
        exported = ExportedModel.open(config.run_dir)
    if exported.is_ranking:
        console.info(
            "this model ranks: predictions are scores of preference, about 1 for what a user would choose and "
            "0 for all else, and no ratings; errors are not measured"
        )
    sources = find_sources(config.pairs, say=console.info)
    layouts = [recognise(source, config.columns, pairs=True).without_time() for source in sources]
    for source, layout in zip(sources, layouts, strict=True):
        console.info(f"{source.shown}: {layout.name}")
    rated = all(layout.has_rating for layout in layouts)
    if not rated and any(layout.has_rating for layout in layouts):
        raise UsageError("some of the files have ratings and others have none; name the columns with --columns "
                         "user_id,item_id, or score them apart.")  # fmt: skip
    model, folding = fold_in_files(config, exported, lambda: dataset_of_model(exported, config.data), world, console)
    parts = Parts(config.out, _schema(rated), _request(config, model, sources), world)
    total, count = sum(source.bytes for source in sources), 0
    with console.progress("predict", total, unit="bytes") as progress:
        for together in _groups(_parts_of(sources, layouts), world.size):
            mine = {number: pieces for number, pieces, _ in together if number % world.size == world.rank}

            def make(number: int, write: Write, watch: StopWatch, mine: dict[int, list[Piece]] = mine) -> None:
                _make_part(mine[number], rated, model, write, watch, parts.note_of(number))

            parts.make(list(mine), make)
            progress.advance(sum(read for _, _, read in together))
            count += len(together)
    figures = np.zeros(6)
    examples: list[str] = []
    for number in range(count):
        noted = json.loads(storage.read_text(parts.note_of(number)))
        figures += noted["figures"]
        examples += noted["examples"]
    rows, rejected, unknown_user, unknown_item, squares, absolute = figures
    if rejected > config.max_rejected * max(rows + rejected, 1):
        raise DataError(f"{int(rejected):,} of {int(rows + rejected):,} rows were refused, more than --max-rejected "
                        f"{config.max_rejected:g} allows, for example {'; '.join(examples[:EXAMPLES])}.")  # fmt: skip
    if rejected:
        console.warn(f"{int(rejected):,} rows were refused, for example {'; '.join(examples[:EXAMPLES])}")
    with console.busy("joining the parts"):
        parts.join(count)
    if folding is not None:
        folding.remove()
    errors = ((squares / rows) ** 0.5, absolute / rows) if rated and rows and not exported.is_ranking else (None, None)
    return Predicted(int(rows), int(rejected), int(unknown_user), int(unknown_item), *errors)


def _schema(rated: bool) -> pa.Schema:
    rating = [("rating", pa.float32())] if rated else []
    flags = [("known_user", pa.bool_()), ("known_item", pa.bool_())]
    return pa.schema(
        [("user_id", pa.string()), ("item_id", pa.string()), *rating, ("prediction", pa.float64()), *flags]
    )


def _request(config: PredictConfig, model: ExportedModel, sources: Sequence[Source]) -> dict[str, Any]:
    files = [[source.shown, source.bytes, storage.version(source.path) if "::" not in source.path else ""]
             for source in sources]  # fmt: skip
    return {"job": "predict", "model": model.identity(), "files": files, "columns given": config.columns,
            "added": model.new.checksum if isinstance(model, FoldedModel) else None}  # fmt: skip


Piece = tuple[Any, Layout, str]


Part = tuple[int, list[Piece], int]


def _groups(parts: Iterator[Part], size: int) -> Iterator[list[Part]]:
    while together := list(islice(parts, size)):
        yield together


def _parts_of(sources: Sequence[Source], layouts: Sequence[Layout]) -> Iterator[Part]:
    """(number, pieces, bytes read) of each part, in order; a part never spans two sources."""
    number = 0
    for source, layout in zip(sources, layouts, strict=True):
        pieces: list[Piece] = []
        before = 0
        for piece in chunks(source, layout):
            if isinstance(piece, str):
                break
            pieces.append((piece, layout, source.shown))
            if len(pieces) == PIECES:
                yield number, pieces, piece[1] - before
                number, pieces, before = number + 1, [], piece[1]
        if pieces:
            yield number, pieces, source.bytes - before
            number += 1


def _make_part(
    pieces: Sequence[Piece], rated: bool, model: ExportedModel, write: Write, watch: StopWatch, note: str
) -> None:
    """Predict the rows of a part, and note its figures: they are there before the part is."""
    figures, examples = np.zeros(6), []
    for piece, layout, shown in pieces:
        check(watch)
        block = parse(piece, layout, Rules(0, None, False))
        table, added = _table(block, rated, model)
        write(table)
        figures += added
        figures[1] += len(block.rejects)
        examples += [f"{shown}: {reason}: {text[:80]!r}" for _, reason, text in block.rejects[:EXAMPLES]]
    storage.write_text(note, json.dumps({"figures": figures.tolist(), "examples": examples[:EXAMPLES]}))


def _table(block: Block, rated: bool, model: ExportedModel) -> tuple[pa.Table, npt.NDArray[np.float64]]:
    user_ids, item_ids = (texts_of(block, side) for side in range(2))
    users, items = model.rows_of("users", user_ids), model.rows_of("items", item_ids)
    prediction = model.predict(users, items)
    error = prediction - block.rating if rated else np.zeros(len(users))
    known_user, known_item = users >= 0, items >= 0
    columns = [user_ids, item_ids, *([block.rating] if rated else []), prediction, known_user, known_item]
    figures = [len(users), 0, (~known_user).sum(), (~known_item).sum(), error @ error, np.abs(error).sum()]
    return pa.table([pa.array(column) for column in columns], schema=_schema(rated)), np.array(figures, np.float64)

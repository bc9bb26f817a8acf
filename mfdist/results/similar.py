"""What is most like each item (or user), as a file: item_id (or user_id), similar_id, rank (from 1), score.

Rows come in the order of their numbers and are cut into segments, each a part of the output that one rank makes (see
``part_files``). Example: 5 segments over 2 ranks: rank 0 makes parts 0, 2, 4, rank 1 parts 1, 3.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.config import flag
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.results.exported_model import SIDES, ExportedModel
from mfdist.results.id_files import read_ids
from mfdist.results.neighbours import MEASURES, Neighbours, schema_of
from mfdist.results.part_files import Parts, Write, check, checksum_of, ending_of, stoppable
from mfdist.results.recommendation_table import ids_of_rows
from mfdist.run.stopping import StopWatch

SEGMENT_ROWS = 1 << 16
BATCH_PAIRS = 1 << 33
"""Scores between two looks at whether the job should stop: a second or so."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SimilarConfig:
    """Flags of jobs/similar.py."""

    run_dir: str = flag("", "run directory with an exported model (required)")
    out: str = flag("", "file to write, .parquet or .csv, or a folder of Parquet parts (a name without an ending); required")  # fmt: skip # noqa: E501
    side: str = flag("items", "items like an item, or users like a user", choices=("items", "users"))
    ids: str = flag("all", "all, or a file of ids: text with one a line, or Parquet or CSV with item_id or user_id")
    top_k: int = flag(10, "neighbours of each", at_least=1)
    measure: str = flag("cosine", "cosine or inner product of the factors", choices=MEASURES)
    unknown_ids: str = flag(
        "skip", "ids of --ids that training did not know: left out, or refused", choices=("skip", "error")
    )
    device: str = flag("auto", "device of the products", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name in ("run_dir", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is missing. See similar.py --help.")
        ending_of(self.out)


class Found(NamedTuple):
    """Rows that were given neighbours, and how many of the ids asked for training did not know."""

    rows: int
    unknown: int


def similar(config: SimilarConfig, world: World, console: Console | None = None) -> Found:
    """Write the neighbours; collective. StopRequested where a signal asks for it, as in ``recommend``."""
    console = console or Console(False)
    with console.busy("opening the model"):
        model = ExportedModel.open(config.run_dir)
        rows, unknown = _wanted(config, model)
    flags = {key: value for key, value in asdict(config).items() if key not in ("device", "run_dir", "out", "ids")}
    request = {**flags, "job": "similar", "model": model.identity(), "wanted": checksum_of(rows)}
    segments = [rows[first : first + SEGMENT_ROWS] for first in range(0, len(rows), SEGMENT_ROWS)]
    parts = Parts(config.out, schema_of(config.side), request, world)
    todo = [number for number in range(len(segments)) if number not in parts.finished]
    done = len(rows) - sum(len(segments[number]) for number in todo)
    if done:
        console.info(f"{done:,} of {len(rows):,} {config.side} are there already")
    with stoppable(world, config.out), console.busy("preparing the search"):
        near = Neighbours(model, config.side, config.measure, world.device) if todo else None

    with console.progress("similar", len(rows), done, unit=config.side) as progress:

        def make(number: int, write: Write, watch: StopWatch) -> None:
            assert near is not None
            segment, size = segments[number], max(1 << 8, min(1 << 14, BATCH_PAIRS // max(near.count, 1)))
            for first in range(0, len(segment), size):
                batch = segment[first : first + size]
                write(near.table(ids_of_rows(model, config.side, batch), batch, config.top_k))
                progress.advance(len(batch) * world.size)
                check(watch)

        parts.make(todo[world.rank :: world.size], make)
    parts.join(len(segments))
    return Found(len(rows), unknown)


def _wanted(config: SimilarConfig, model: ExportedModel) -> tuple[Ints, int]:
    """Ascending rows, and how many ids training did not know; UsageError where none is left, or one is refused."""
    if config.ids == "all":
        return np.arange(model.num_users if config.side == SIDES[0] else model.num_items), 0
    names = read_ids(config.ids, "ids", f"{config.side[:-1]}_id")
    rows = model.rows_of(config.side, names)
    unknown = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    if unknown and (config.unknown_ids == "error" or len(unknown) == len(names)):
        remedy = "" if len(unknown) == len(names) else " Take them out, or give --unknown-ids skip."
        raise UsageError(f"{len(unknown)} of the {len(names)} {config.side} of --ids {storage.redact(config.ids)} were "
                         f"not known to training (the first: '{unknown[0]}').{remedy}")  # fmt: skip
    return np.sort(rows[rows >= 0]), len(unknown)

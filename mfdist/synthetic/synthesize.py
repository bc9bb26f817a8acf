"""Synthetic ratings with a known answer, streamed to a file of any size: `user_id, item_id, rating, timestamp`.

    synthesize(SynthesizeConfig(rows=200_000, out="ratings.csv"))  ->  ratings.csv, ratings.csv.truth.json

The rating histogram comes out exactly: a first pass counts the noisy scores of all rows in fine bins, a second
reads the exact scores in the bins where a threshold falls, a third writes. Memory holds a few pieces of rows and
8 bytes an item, whatever the number of rows. The truth beside the file gives the noise floor, the error of a model
that knows the planted scores: no model can be expected to do better. Nothing here is real, and the truth says so.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.config import flag
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.synthetic import planted
from mfdist.synthetic.degrees import FloatArray, Int64Array, degree_classes
from mfdist.synthetic.planted import NUM_BINS, Planted, Rows
from mfdist.synthetic.presets import DAY_SECONDS, PRESETS, Preset

T = TypeVar("T")
PIECE_ROWS = 1 << 18
ENDINGS = (".csv", ".csv.gz", ".parquet")
PASSES = 3
"""Over all rows, two of them for the thresholds."""
FORMAT_VERSION = 1
MAX_DENSITY = 0.1  # of all (user, item) pairs, where the numbers of users and items are ours to choose
NEVER = 1000.0  # logits: a threshold that no noisy score passes
_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float32()), ("timestamp", pa.int64())]
)


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """The flags of jobs/synthesize.py."""

    preset: str = flag("builtin", "what the data is like; electronics is a twin of the Amazon file",
                       choices=tuple(PRESETS))  # fmt: skip
    rows: int | None = flag(None, "number of ratings; not set: the preset's own", at_least=1, at_most=10**12)
    users: int | None = flag(None, "number of users; not set: in proportion to the rows", at_least=1)
    items: int | None = flag(None, "number of items; not set: in proportion to the rows", at_least=1)
    seed: int = flag(42, "seed of everything random", at_least=0, at_most=2**63 - 1)
    out: str = flag(
        "synthetic.csv", "file to write: .csv (no header), .csv.gz, .parquet; OUT.truth.json goes beside it"
    )

    def __post_init__(self) -> None:
        if not self.out.endswith(ENDINGS):
            raise UsageError(f"--out {storage.redact(self.out)}: the name must end in {', '.join(ENDINGS)}.")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """OUT.truth.json. ``noise_floor`` is the expected {rmse, mae} of a model that knows the planted scores.

    ``thresholds`` and ``effects`` are in logits; ``repeated_pairs`` counts rows whose user has that item already.
    """

    synthetic: bool
    note: str
    preset: str
    seed: int
    rows: int
    num_users: int
    num_items: int
    noise_floor: dict[str, float]
    global_mean: float
    rating_histogram: list[tuple[float, int]]
    thresholds: list[float]
    effects: dict[str, float]
    repeated_pairs: int
    format_version: int = FORMAT_VERSION


def truth_path(out: str) -> str:
    return f"{out}.truth.json"


def read_truth(out: str) -> Truth:
    """The truth beside a synthetic file."""
    return Truth(**json.loads(storage.read_text(truth_path(out))))


def synthesize(config: SynthesizeConfig, console: Console | None = None) -> Truth:
    """Write ``config.out`` and its truth; UsageError where rows, users and items cannot be had together."""
    console = console or Console(False)
    preset = PRESETS[config.preset]
    with console.busy("choosing users and items"):
        source = _plant(config, preset)
    histogram = histogram_for(preset, source.num_rows)
    storage.remove(truth_path(config.out))
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as threads,
        console.progress("synthesize", PASSES * source.num_rows) as progress,
    ):
        thresholds = _thresholds(source, histogram, threads, progress.advance)
        squared = absolute = 0.0
        repeated = 0
        found = np.zeros(planted.NUM_STARS, np.int64)
        with storage.open_write(config.out) as stream, _writer(config.out, stream) as write:
            encode = _encoder(config, source, preset, thresholds)
            for piece in _in_order(threads, encode, source.pieces(PIECE_ROWS)):
                write(piece.content)
                progress.advance(int(piece.stars.sum()))
                squared, absolute = squared + piece.squared, absolute + piece.absolute
                repeated, found = repeated + piece.repeated, found + piece.stars
    assert np.array_equal(found, histogram), "the histogram is exact by construction"
    truth = _truth(config, source, thresholds, found, (squared, absolute), repeated)
    storage.write_text(truth_path(config.out), json.dumps(dataclasses.asdict(truth), indent=1) + "\n")
    return truth


def histogram_for(preset: Preset, rows: int) -> Int64Array:
    """Rows of each star at ``rows`` rows: the preset's shares, rounded so that they sum to ``rows``."""
    edges = np.cumsum([0, *preset.histogram])
    whole = int(edges[-1])
    scaled = np.array([(int(edge) * rows * 2 + whole) // (2 * whole) for edge in edges], np.int64)
    return scaled[1:] - scaled[:-1]


def _plant(config: SynthesizeConfig, preset: Preset) -> Planted:
    rows = preset.rows if config.rows is None else config.rows
    curves = (preset.users, preset.items)
    natural = [curve.num_ids_for(rows) for curve in curves]
    crowding = max(1.0, math.sqrt(rows / (MAX_DENSITY * natural[0] * natural[1])))  # above 1 for very few rows
    counts = []
    for name, count, given in zip(("users", "items"), natural, (config.users, config.items), strict=True):
        if given is not None and given > rows:
            raise UsageError(f"--{name} {given} is more than --rows {rows}: each has at least one rating.")
        counts.append(min(math.ceil(count * crowding), rows) if given is None else given)
    if rows > counts[0] * counts[1]:
        raise UsageError(f"--rows {rows} is more than --users {counts[0]} times --items {counts[1]}.")
    users, items = (degree_classes(curve, count, rows) for curve, count in zip(curves, counts, strict=True))
    return Planted(users, items, preset.effects, config.seed)


# Thresholds ---------------------------------------------------------------------------------------


def _thresholds(
    source: Planted, histogram: Int64Array, threads: ThreadPoolExecutor, advance: Callable[[int], None]
) -> FloatArray:
    """(4,): scores between two rows' noisy ones such that each star gets exactly its rows."""
    wanted = np.cumsum(histogram)[:-1]
    pieces = source.pieces(PIECE_ROWS)
    counts = np.zeros(NUM_BINS, np.int64)
    for piece_counts in _in_order(threads, lambda p: _bin_counts(source.rows(p)), pieces):
        counts += piece_counts
        advance(int(piece_counts.sum()))
    below = np.concatenate([[0], np.cumsum(counts)])
    bins = np.searchsorted(below, wanted, side="right") - 1  # below[bin] <= wanted < below[bin + 1]
    parts = []
    for (first, end), part in zip(
        pieces, _in_order(threads, lambda p: _scores_in(source.rows(p), bins), pieces), strict=True
    ):
        parts.append(part)
        advance(int(source.item_first_row[end] - source.item_first_row[first]))
    thresholds = np.full(len(wanted), NEVER)
    for k in np.flatnonzero(wanted < source.num_rows):
        scores = np.sort(np.concatenate([part[k] for part in parts]))
        thresholds[k] = _between(scores, int(wanted[k] - below[bins[k]]))
    return thresholds


def _bin_counts(rows: Rows) -> Int64Array:
    return np.bincount(planted.bins_of(rows.noisy), minlength=NUM_BINS)


def _scores_in(rows: Rows, bins: Int64Array) -> list[FloatArray]:
    found = planted.bins_of(rows.noisy)
    return [rows.noisy[found == bin_] for bin_ in bins]


def _between(scores: FloatArray, lower: int) -> float:
    """A threshold that has ``lower`` of the sorted scores at or below it."""
    return float(scores[lower - 1] if lower else np.nextafter(scores[0], -np.inf))


# Pieces and files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Rows ready to be written, and their share of the truth."""

    content: Any
    stars: Int64Array
    squared: float
    absolute: float
    repeated: int


def _encoder(
    config: SynthesizeConfig, source: Planted, preset: Preset, thresholds: FloatArray
) -> Callable[[tuple[int, int]], _Piece]:
    def encode(piece: tuple[int, int]) -> _Piece:
        rows = source.rows(piece)
        stars, squared, absolute = planted.ratings_of(rows, thresholds)
        days = planted.days_of(rows, source.num_rows, *preset.days, config.seed)
        users = planted.user_ids(rows.user, config.seed)
        items = planted.item_ids(rows.item, source.num_items, config.seed)
        content = columns(users, items, stars, days * DAY_SECONDS)
        counts = np.bincount(stars, minlength=planted.NUM_STARS + 1)[1:]
        return _Piece(content, counts, squared, absolute, rows.repeated)

    columns = _table if config.out.endswith(".parquet") else planted.csv_lines
    return encode


def _table(users: Any, items: Any, stars: Any, seconds: Int64Array) -> pa.Table:
    arrays = [_fixed_strings(users), _fixed_strings(items), pa.array(stars.astype(np.float32)), pa.array(seconds)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _fixed_strings(characters: npt.NDArray[np.uint8]) -> pa.Array:
    """(rows, width) ASCII characters as strings, without an object a row."""
    rows, width = characters.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(width)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(characters.reshape(-1)))


class _writer:
    """Context: a function that takes pieces' contents and puts them into ``stream`` as ``out``'s ending says."""

    def __init__(self, out: str, stream: IO[bytes]) -> None:
        self._target: Any
        self._write: Callable[[Any], Any]
        if out.endswith(".parquet"):
            self._target = pq.ParquetWriter(stream, _SCHEMA, compression="zstd", use_dictionary=["item_id", "rating"])
            self._write = self._target.write_table
        else:
            # mtime and name are left out, so that the same seed gives the same bytes
            self._target = gzip.GzipFile("", "wb", 1, stream, mtime=0) if out.endswith(".gz") else io.BytesIO()
            target = self._target if out.endswith(".gz") else stream
            self._write = lambda lines: target.write(lines.data)

    def __enter__(self) -> Callable[[Any], Any]:
        return self._write

    def __exit__(self, *error: object) -> None:
        self._target.close()


def _in_order(threads: ThreadPoolExecutor, work: Callable[[Any], T], pieces: list[Any]) -> Iterator[T]:
    """``work`` of each piece, in order, on all threads with a few pieces ahead: memory stays bounded."""
    ahead = 2 * (os.cpu_count() or 1)
    running: collections.deque[Future[T]] = collections.deque()
    for piece in pieces:
        running.append(threads.submit(work, piece))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _truth(
    config: SynthesizeConfig, source: Planted, thresholds: FloatArray, histogram: Int64Array,
    sums: tuple[float, float], repeated: int,
) -> Truth:  # fmt: skip
    rows = source.num_rows
    stars = np.arange(1, planted.NUM_STARS + 1)
    return Truth(
        synthetic=True,
        note="Synthetic ratings: made from a seed, nobody gave them. Figures on them say nothing about real people.",
        preset=config.preset,
        seed=config.seed,
        rows=rows,
        num_users=source.num_users,
        num_items=source.num_items,
        noise_floor={"rmse": float(np.sqrt(sums[0] / rows)), "mae": sums[1] / rows},
        global_mean=float(stars @ histogram / rows),
        rating_histogram=[(float(star), int(count)) for star, count in zip(stars, histogram, strict=True)],
        thresholds=thresholds.tolist(),
        effects=dataclasses.asdict(source.effects),
        repeated_pairs=repeated,
    )

"""The exported model: safetensors, two vocabularies and JSON, written streaming and read without running code.

    RUN/model/model.safetensors   user_embedding (users, dim), item_embedding (items, dim) and, where the model has
                                  them, user_bias (users,), item_bias (items,), offset (1,); float32, rows as in the
                                  dataset
    RUN/model/users.parquet, items.parquet   row: int64, id: string
    RUN/model/config.json         written last: a folder without it is no model
    RUN/model/README.md           the model card

One formula reads every model:  score = <p_u, q_i> + user_bias[u] + item_bias[i] + offset  (those that exist), and
prediction = low + (high - low) sigmoid(score) where ``sigmoid`` is set, the score itself elsewhere. With ``objective``
"ranking" in config.json it is no rating but a score of preference: about 1 for what a user would choose, else 0.
"""

from __future__ import annotations

import json
import math
import mmap
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import json_tables, storage
from mfdist.data.dataset import Dataset, column_range
from mfdist.errors import DataError
from mfdist.results.model_card import model_card
from mfdist.results.model_config import check_config

if TYPE_CHECKING:
    from mfdist.results.id_lookup import IdLookup

FORMAT_VERSION = 1
TENSORS = ("user_embedding", "item_embedding", "user_bias", "item_bias", "offset")
SIDES = ("users", "items")
CACHED_VOCABULARY_BYTES = 256 << 20
BLOCK_ROWS = 1 << 16

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Chunks = tuple[tuple[int, ...], Iterable[npt.NDArray[np.float32]]]

REMEDY = "export the run again"
_ID_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string())])


def model_path(run: str, *parts: str) -> str:
    return storage.join(run, "model", *parts)


# Writing ------------------------------------------------------------------------------------------


def write_model(run: str, tensors: Mapping[str, Chunks], config: Mapping[str, Any], dataset: Dataset) -> None:
    """Write RUN/model from ``tensors``: name -> (shape, float32 chunks in row order); one rank calls.

    Chunks are taken tensor by tensor in the mapping's order, each exactly once, and never held together. ``config``
    gives model, dim, bias, sigmoid, sigmoid_range and cold (and whatever else the model card should keep); what the
    dataset knows is added here. Files appear whole, and config.json last.
    """
    assert set(tensors) <= set(TENSORS), f"unknown tensors {set(tensors) - set(TENSORS)}"
    whole = _complete_config(config, dataset)
    assert tensors["user_embedding"][0] == (dataset.manifest.num_users, whole["dim"])
    assert tensors["item_embedding"][0] == (dataset.manifest.num_items, whole["dim"])
    storage.remove(model_path(run, "config.json"))
    with storage.open_write(model_path(run, "model.safetensors")) as stream:
        write_safetensors(stream, tensors)
    for side in SIDES:
        _copy_ids(storage.join(dataset.path, f"{side}.parquet"), model_path(run, f"{side}.parquet"))
    storage.write_text(model_path(run, "README.md"), model_card(whole))
    storage.write_text(model_path(run, "config.json"), json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def write_safetensors(stream: IO[bytes], tensors: Mapping[str, Chunks]) -> None:
    """The safetensors container of float32 tensors: header length (8 bytes, little endian), JSON header, raw data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes, so that it can be memory-mapped
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, (shape, chunks) in tensors.items():
        written = 0
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk, "<f4").reshape(-1).view(np.uint8).data)
            written += chunk.size
        assert written == math.prod(shape), f"{name}: {written} values given, its shape {shape} has another number"


def _complete_config(config: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        **config,
        "format_version": FORMAT_VERSION,
        "global_mean": manifest.global_mean,
        "rating_scale": list(manifest.rating_scale),
        "rating_step": manifest.rating_step,
        "dataset": {
            "name": manifest.name, "fingerprint": manifest.fingerprint,
            "split_fingerprint": manifest.split.get("fingerprint"),
            "num_users": manifest.num_users, "num_items": manifest.num_items,
        },
    }  # fmt: skip


def _copy_ids(source: str, target: str) -> None:
    """Columns row and id of a vocabulary, a batch at a time."""
    fs, inner = storage.arrow_filesystem(source)
    with (
        pq.ParquetFile(inner, filesystem=fs) as file,
        storage.open_write(target) as stream,
        pq.ParquetWriter(stream, _ID_SCHEMA, compression="zstd") as writer,
    ):
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=["row", "id"]):
            writer.write_table(pa.Table.from_batches([batch]).select(["row", "id"]).cast(_ID_SCHEMA))


# Reading ------------------------------------------------------------------------------------------


class ExportedModel:
    """RUN/model opened for prediction; tensors are memory-mapped, and only the rows that are asked for are read.

    An export on an object store is copied once to a temporary local file. Rows are the dataset's row numbers, and -1
    stands for an id outside the vocabulary: with biases its embedding and bias count as zero (the known side decides),
    without them the prediction is the training mean, or 0 of a ranking.
    """

    def __init__(self, run: str, folder: str, config: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.run = run
        self.folder = folder
        self.config = config
        self.user_embedding = tensors["user_embedding"]
        self.item_embedding = tensors["item_embedding"]
        self.user_bias = tensors.get("user_bias")
        self.item_bias = tensors.get("item_bias")
        self.offset = float(tensors["offset"][0]) if "offset" in tensors else 0.0
        self._ids: dict[str, pa.ChunkedArray] = {}
        self._lookups: dict[str, IdLookup | None] = {}  # made when a side is asked for the second time
        self._asked: set[str] = set()

    @staticmethod
    def open(run: str) -> ExportedModel:
        """The model of a run directory, or of its own folder; DataError where there is none, or a damaged one."""
        folder = model_path(run)
        if not storage.exists(storage.join(folder, "config.json")) and storage.exists(
            storage.join(run, "model.safetensors")
        ):
            folder = storage.absolute(run.rstrip("/"))
            run = folder.removesuffix("/model")
        path = storage.join(folder, "config.json")
        try:
            config = json_tables.read(storage.inside(folder, "config.json"), REMEDY)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{storage.redact(run)} has no exported model: {storage.redact(path)} is missing. "
                            "Let its training finish, or name another run.") from None  # fmt: skip
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{storage.redact(path)} has format version {json_tables.short(version)}, this mfdist "
                            f"reads {FORMAT_VERSION}; {REMEDY}.")  # fmt: skip
        try:
            check_config(config)
        except ValueError as error:
            raise json_tables.damaged(path, error, REMEDY) from None
        tables = storage.inside(folder, "model.safetensors")
        tensors = _read_tensors(tables)
        _check_shapes(tensors, config, storage.redact(tables))
        return ExportedModel(run, folder, config, tensors)

    def identity(self) -> list[str]:
        """What changes when the model is exported anew, other runs' models included."""
        text = storage.read_text(storage.join(self.folder, "config.json"))
        return [text, storage.version(storage.join(self.folder, "model.safetensors"))]

    @property
    def num_users(self) -> int:
        return len(self.user_embedding)

    @property
    def num_items(self) -> int:
        return len(self.item_embedding)

    @property
    def has_biases(self) -> bool:
        """Whether there is a known side to fall back on for an id outside the vocabulary."""
        return self.item_bias is not None

    @property
    def is_ranking(self) -> bool:
        """Whether predictions are scores of preference, not ratings."""
        return self.config.get("objective") == "ranking"

    @property
    def of_unknown(self) -> float:
        """What a model without biases predicts for an id outside the vocabulary."""
        return 0.0 if self.is_ranking else float(self.config["global_mean"])

    def predict(self, user: Array, item: Array) -> Floats:
        """Predicted ratings (of a ranking: scores), not clipped: float64 (rows,) of user and item rows, -1 unknown."""
        prediction = np.empty(len(user))
        for first in range(0, len(user), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            prediction[block] = self._predict_block(np.asarray(user[block]), np.asarray(item[block]))
        return prediction

    def users(self, rows: Array) -> tuple[npt.NDArray[np.float32], Floats]:
        """Factors (rows, dim) and biases (rows,) of user rows; zeros for -1, and for biases that the model lacks."""
        known, factors, bias = rows >= 0, np.zeros((len(rows), self.config["dim"]), np.float32), np.zeros(len(rows))
        factors[known] = self.user_embedding[rows[known]]
        if self.user_bias is not None:
            bias[known] = self.user_bias[rows[known]]
        return factors, bias

    def release_users(self) -> None:
        """Take the user rows read so far out of this process's memory; the system's cache keeps them."""
        mapped = self.user_embedding.base
        if isinstance(mapped, np.memmap) and isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.base.madvise(mmap.MADV_DONTNEED)

    def rating_of_score(self, score: Array) -> Floats:
        """The predicted rating of a raw score: the sigmoid onto its range, or the score itself."""
        if not self.config["sigmoid"]:
            return np.asarray(score, np.float64)
        low, high = self.config["sigmoid_range"]
        with np.errstate(over="ignore"):  # exp of a very negative score is inf, and its sigmoid 0
            return low + (high - low) / (1.0 + np.exp(-np.asarray(score, np.float64)))  # type: ignore[no-any-return]

    def ids(self, side: str, first: int = 0, end: int | None = None) -> pa.ChunkedArray:
        """Original ids (strings) of rows ``first`` to ``end`` of ``side`` ('users' or 'items')."""
        path = storage.inside(self.folder, f"{side}.parquet")
        if side not in self._ids and storage.size(path) <= CACHED_VOCABULARY_BYTES:
            self._ids[side] = column_range(path, "id", 0, self.num_users if side == "users" else self.num_items)
        if side in self._ids:
            return self._ids[side].slice(first, None if end is None else end - first)
        return column_range(path, "id", first, end)

    def rows_of(self, side: str, ids: Sequence[str] | pa.Array) -> npt.NDArray[np.int64]:
        """Row numbers of original ids, -1 where the vocabulary does not have one.

        The first call takes one pass over the vocabulary; the next ones look up hashes, where it fits into memory.
        """
        import pyarrow.compute as pc  # a third of the time that loading takes

        wanted = pa.array(ids, pa.string())
        lookup = self._lookup(side)
        if lookup is not None:
            return lookup.rows(wanted)
        unique = wanted.unique()
        rows = np.full(len(unique) + 1, -1, np.int64)
        count = self.num_users if side == "users" else self.num_items
        for first in range(0, count, 1 << 20):
            names = self.ids(side, first, min(first + (1 << 20), count)).combine_chunks()
            position = pc.fill_null(pc.index_in(names, value_set=unique), len(unique)).to_numpy(zero_copy_only=False)
            hits = np.flatnonzero(position < len(unique))
            rows[position[hits]] = first + hits
        found: npt.NDArray[np.int64] = rows[pc.index_in(wanted, value_set=unique).to_numpy(zero_copy_only=False)]
        return found

    def _lookup(self, side: str) -> IdLookup | None:
        """The table of hashes of a side, from the second call on."""
        if side not in self._asked:
            self._asked.add(side)
            return None
        if side not in self._lookups:
            from mfdist.results.id_lookup import IdLookup  # compiled code, which one call does not need

            self.ids(side, 0, 0)  # keeps a small vocabulary
            self._lookups[side] = IdLookup.of(self._ids[side]) if side in self._ids else None
        return self._lookups[side]

    def _predict_block(self, user: Array, item: Array) -> Floats:
        known_user, known_item = user >= 0, item >= 0
        both = np.flatnonzero(known_user & known_item)
        factors, bias = self.users(user)
        score = np.full(len(user), self.offset)
        score[both] += np.einsum("nd,nd->n", factors[both], self.item_embedding[item[both]])
        score += bias
        if self.item_bias is not None:
            score[known_item] += self.item_bias[item[known_item]]
        prediction = self.rating_of_score(score)
        if not self.has_biases:
            prediction[~(known_user & known_item)] = self.of_unknown
        return prediction


def _read_tensors(path: str) -> dict[str, Array]:
    """Memory-mapped float32 tensors of a safetensors file; DataError names a damaged one."""
    shown = storage.redact(path)
    try:
        local = storage.local_path(path) if storage.is_local(path) else _fetched(path)
        with open(local, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = stream.seek(0, 2)
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            stream.seek(8)
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: _map_tensor(local, name, entry, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise DataError(f"{shown} is missing; export the run again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{shown} is damaged ({error}); export the run again.") from None


def _map_tensor(local: str, name: str, entry: dict[str, Any], start: int, size: int) -> Array:
    begin, end = json_tables.typed(tuple[int, int], entry["data_offsets"], f"{name}.data_offsets")
    shape = json_tables.typed(tuple[int, ...], entry["shape"], f"{name}.shape")
    fits = begin >= 0 <= min(shape, default=0) and end - begin == 4 * math.prod(shape) and start + end <= size
    if entry["dtype"] != "F32" or not fits:
        raise ValueError(f"tensor {name} does not fit its file")
    if begin == end:
        return np.empty(shape, np.float32)
    return np.asarray(np.memmap(local, "<f4", "r", start + begin, shape))


def _fetched(path: str) -> str:
    """A local copy of a remote file, unlinked when this process ends."""
    fs, inner = storage.filesystem(path)
    copy = tempfile.NamedTemporaryFile(prefix="mfdist-", suffix=".safetensors")  # noqa: SIM115 (lives as long as we do)
    _FETCHED.append(copy)
    fs.get_file(inner, copy.name)
    return copy.name


_FETCHED: list[Any] = []


def _check_shapes(tensors: dict[str, Array], config: dict[str, Any], shown: str) -> None:
    users, items, dim = config["dataset"]["num_users"], config["dataset"]["num_items"], config["dim"]
    expected = {"user_embedding": (users, dim), "item_embedding": (items, dim), "user_bias": (users,),
                "item_bias": (items,), "offset": (1,)}  # fmt: skip
    for name in ("user_embedding", "item_embedding", *tensors):
        if name not in tensors or name not in expected or tensors[name].shape != expected[name]:
            found = tensors[name].shape if name in tensors else "missing"
            raise DataError(f"{shown}: tensor {name} is {found}, config.json wants {expected.get(name, 'none such')}; "
                            "export the run again.")  # fmt: skip


def write_card(run: str, report: Mapping[str, Any], validation: Mapping[str, Any] | None = None) -> None:
    """Write the model card again with the results of ``report`` and of ``ErrorSums.figures()``; nothing happens in a
    run without an export."""
    path = model_path(run, "config.json")
    if storage.exists(path):
        card = model_card(json_tables.read(path, REMEDY), report, validation)
        storage.write_text(model_path(run, "README.md"), card)

"""A model's vectors for other systems: an inner product is the score, the item's bias being one more dimension.

    item vector = (q, b_i), user vector = (p, 1):  <user, item> = <p, q> + b_i, which orders a user's items as the
    model does (the user's bias, the offset and the sigmoid do not change the order)

    OUT/users-00000.parquet, items-00000.parquet ...       id: string, vector: float32 list of the dimension
    OUT/users-00000.safetensors, items-00000.safetensors   the tensor "vectors" (rows, dimension)
    OUT/items-00000.faiss                                  an IndexFlatIP of the items
    OUT/items-00000.hnswlib                                an HNSW graph in the space "ip"; labels are rows of the shard

Beside the last three kinds ``users.ids.parquet`` and ``items.ids.parquet`` hold row and id. Every side is cut into
shards of at most a size, in row order; ``vectors.json`` lists them.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.config import flag, parse_bytes
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.results.exported_model import SIDES, ExportedModel, write_safetensors

FORMATS = ("faiss", "hnswlib", "parquet", "safetensors")
NEIGHBOURS, BUILD_WIDTH = 16, 200
Floats32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags of jobs/export.py."""

    run_dir: str = flag("", "run directory with an exported model (required)")
    out: str = flag("", "folder or URL to write (required)")
    format: str = flag("parquet", "what the vectors are for", choices=FORMATS)
    max_shard: int = flag(2 << 30, "bytes of vectors in one file, such as 2GiB", parse=parse_bytes)

    def __post_init__(self) -> None:
        for name in ("run_dir", "out"):
            if not getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is missing. See export.py --help.")
        if self.max_shard < 1 << 20:
            raise UsageError(f"--max-shard {self.max_shard}: at least 1MiB is needed.")


def export_vectors(config: ExportConfig, console: Console | None = None) -> list[str]:
    """Write the vectors and return the names of the files; ``vectors.json`` last. UsageError without the library."""
    console = console or Console(False)
    model = ExportedModel.open(config.run_dir)
    write = _writer(config.format)
    sides = ("items",) if config.format in ("faiss", "hnswlib") else SIDES
    storage.remove(storage.join(config.out, "vectors.json"))
    shards: list[dict[str, Any]] = []
    total = sum(model.num_users if side == "users" else model.num_items for side in sides)
    with console.progress("export", total, unit="vectors") as progress:
        for side in sides:
            for number, first, vectors in _shards(model, side, config.max_shard):
                name = f"{side}-{number:05d}.{config.format}"
                write(storage.join(config.out, name), vectors, model.ids(side, first, first + len(vectors)))
                shards.append({"file": name, "side": side, "first_row": first, "rows": len(vectors)})
                progress.advance(len(vectors))
    if config.format != "parquet":
        with console.busy("writing the ids"):
            _write_ids(config.out, model)
    about = {"format": config.format, "dimension": _dimension(model), "measure": "inner product",
             "model": model.config, "files": shards}  # fmt: skip
    storage.write_text(storage.join(config.out, "vectors.json"), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return [shard["file"] for shard in shards]


def _write_ids(out: str, model: ExportedModel) -> None:
    for side in SIDES:
        count = model.num_users if side == "users" else model.num_items
        table = pa.table({"row": np.arange(count), "id": model.ids(side, 0, count)})
        with storage.open_write(storage.join(out, f"{side}.ids.parquet")) as stream:
            pq.write_table(table, stream, compression="zstd")


def vectors_of(model: ExportedModel, side: str, first: int, end: int) -> Floats32:
    """Vectors of rows ``first`` to ``end`` of 'users' or 'items': float32 (rows, dimension)."""
    factors = (model.user_embedding if side == "users" else model.item_embedding)[first:end]
    if model.item_bias is None:
        return np.array(factors)
    last = np.ones(len(factors), np.float32) if side == "users" else model.item_bias[first:end]
    return np.concatenate([factors, last[:, None]], axis=1)


def _dimension(model: ExportedModel) -> int:
    return int(model.item_embedding.shape[1]) + (model.item_bias is not None)


def _shards(model: ExportedModel, side: str, most: int) -> Iterator[tuple[int, int, Floats32]]:
    """(number, first row, vectors) of a side's shards; one, of no rows, where there is none."""
    count = model.num_users if side == "users" else model.num_items
    rows = max(1, most // (4 * _dimension(model)))
    for number, first in enumerate(range(0, max(count, 1), rows)):
        yield number, first, vectors_of(model, side, first, min(first + rows, count))


def _writer(kind: str) -> Callable[[str, Floats32, Any], None]:
    if kind == "parquet":
        return _write_parquet
    if kind == "safetensors":
        return _write_safetensors
    try:
        library = importlib.import_module(kind)
    except ImportError:
        raise UsageError(f"--format {kind} needs the library {kind}: pip install 'mfdist[{kind}]'.") from None
    return lambda path, vectors, _ids: _write_index(path, _faiss if kind == "faiss" else _hnswlib, library, vectors)


def _write_parquet(path: str, vectors: Floats32, ids: Any) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    with storage.open_write(path) as stream:
        pq.write_table(pa.table({"id": ids, "vector": column}), stream, compression="zstd")


def _write_safetensors(path: str, vectors: Floats32, ids: Any) -> None:
    with storage.open_write(path) as stream:
        write_safetensors(stream, {"vectors": (vectors.shape, [vectors])})


def _write_index(path: str, build: Callable[[Any, Floats32, str], None], library: Any, vectors: Floats32) -> None:
    """These libraries write to local files alone."""
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "index")
        build(library, vectors, local)
        with storage.open_write(path) as stream, open(local, "rb") as made:
            while content := made.read(1 << 22):
                stream.write(content)


def _faiss(library: Any, vectors: Floats32, path: str) -> None:
    index = library.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    library.write_index(index, path)


def _hnswlib(library: Any, vectors: Floats32, path: str) -> None:
    index = library.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=max(len(vectors), 1), M=NEIGHBOURS, ef_construction=BUILD_WIDTH)
    index.add_items(vectors, np.arange(len(vectors)))
    index.save_index(path)

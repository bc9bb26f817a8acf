"""Vectors for other systems: their inner products order items as the model does."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from datasets import make_dataset
from test_evaluate import job
from test_export import CONFIG, PLAIN, export

import mfdist
from mfdist.errors import UsageError
from mfdist.results import vector_files as module
from mfdist.results.vector_files import ExportConfig, export_vectors


@pytest.fixture(params=[CONFIG, PLAIN], ids=["biases", "plain"])
def run(request, tmp_path):
    export(tmp_path / "run", make_dataset(tmp_path / "data", rows=300, lanes=3, users=40, items=30), request.param)
    return str(tmp_path / "run")


def best(run, user, k=5):
    return mfdist.load(run).recommend([user], k=k)["item_id"].to_pylist()


def test_parquet_in_shards(tmp_path, run, monkeypatch):
    monkeypatch.setattr(module, "_dimension", lambda model: model.item_embedding.shape[1] + model.has_biases)
    config = ExportConfig(run_dir=run, out=str(tmp_path / "o"), format="parquet")
    object.__setattr__(config, "max_shard", 12 * 4 * 7)
    files = export_vectors(config)
    assert [name for name in files if name.startswith("items")] == sorted(n for n in files if n.startswith("items"))
    assert len(files) > 4
    sides = {}
    for side in ("users", "items"):
        tables = [pq.read_table(tmp_path / "o" / name) for name in files if name.startswith(side)]
        ids = [i for table in tables for i in table["id"].to_pylist()]
        sides[side] = ids, np.array([v for table in tables for v in table["vector"].to_pylist()], np.float32)
    assert sides["users"][0] == [f"u{k}" for k in range(40)] and sides["items"][0] == [f"i{k}" for k in range(30)]
    order = np.argsort(-(sides["users"][1][7] @ sides["items"][1].T))[:5]
    assert [sides["items"][0][k] for k in order] == best(run, "u7")
    about = json.loads((tmp_path / "o/vectors.json").read_text())
    assert [shard["file"] for shard in about["files"]] == files and about["measure"] == "inner product"


def test_safetensors_has_the_ids_beside(tmp_path, run):
    assert job("export").main(["--run-dir", run, "--format", "safetensors", "--out", str(tmp_path / "o")]) == 0
    users, items = (
        safetensors.numpy.load_file(tmp_path / f"o/{side}-00000.safetensors")["vectors"] for side in ("users", "items")
    )
    ids = pq.read_table(tmp_path / "o/items.ids.parquet")["id"].to_pylist()
    assert [ids[k] for k in np.argsort(-(users[3] @ items.T))[:5]] == best(run, "u3")


@pytest.mark.parametrize("kind", ["faiss", "hnswlib"])
def test_an_index_finds_the_items_of_the_model(tmp_path, run, kind):
    library = pytest.importorskip(kind, reason=f"{kind} is an extra of its own")
    (name,) = export_vectors(ExportConfig(run_dir=run, out=str(tmp_path / "o"), format=kind))
    user = module.vectors_of(mfdist.load(run).exported, "users", 9, 10)
    if kind == "faiss":
        _, rows = library.read_index(str(tmp_path / "o" / name)).search(user, 5)
    else:
        index = library.Index(space="ip", dim=user.shape[1])
        index.load_index(str(tmp_path / "o" / name))
        index.set_ef(30)
        rows, _ = index.knn_query(user, k=5)
    ids = pq.read_table(tmp_path / "o/items.ids.parquet")["id"].to_pylist()
    assert [ids[row] for row in rows[0]] == best(run, "u9")


@pytest.mark.parametrize("kind", ["faiss", "hnswlib", "safetensors"])
def test_shards_are_searched_one_by_one(tmp_path, run, kind, monkeypatch):
    """Eleven items a shard: the best of all shards, with the first row of each added, are the model's."""
    library = None if kind == "safetensors" else pytest.importorskip(kind, reason=f"{kind} is an extra of its own")
    exported = mfdist.load(run).exported
    config = ExportConfig(run_dir=run, out=str(tmp_path / "o"), format=kind)
    user = module.vectors_of(exported, "users", 9, 10)
    object.__setattr__(config, "max_shard", 11 * 4 * user.shape[1])
    export_vectors(config)
    shards = [one for one in json.loads((tmp_path / "o/vectors.json").read_text())["files"] if one["side"] == "items"]
    assert [(one["first_row"], one["rows"]) for one in shards] == [(0, 11), (11, 11), (22, 8)]
    found = []
    for one in shards:
        path = str(tmp_path / "o" / one["file"])
        if kind == "faiss":
            scores, rows = (part[0] for part in library.read_index(path).search(user, 5))
        elif kind == "hnswlib":
            index = library.Index(space="ip", dim=user.shape[1])
            index.load_index(path)
            index.set_ef(30)
            rows, distance = (part[0] for part in index.knn_query(user, k=5))
            scores = 1 - distance
        else:
            scores = (safetensors.numpy.load_file(path)["vectors"] @ user.T)[:, 0]
            rows = range(len(scores))
        found += [(score, one["first_row"] + int(row)) for score, row in zip(scores, rows)]
    ids = pq.read_table(tmp_path / "o/items.ids.parquet")["id"].to_pylist()
    assert [ids[row] for _, row in sorted(found, reverse=True)[:5]] == best(run, "u9")


def test_a_missing_library_is_explained(tmp_path, run, monkeypatch):
    monkeypatch.setitem(module.importlib.sys.modules, "faiss", None)
    with pytest.raises(UsageError, match=r"mfdist\[faiss\]"):
        export_vectors(ExportConfig(run_dir=run, out=str(tmp_path / "o"), format="faiss"))
    for name in ("run_dir", "out"):
        with pytest.raises(UsageError, match="is missing"):
            ExportConfig(**({"run_dir": "r", "out": "o"} | {name: ""}))

"""The export: a streamed safetensors container, ids beside it, one prediction formula, damage named."""

from __future__ import annotations

import json
import os
import tracemalloc
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from datasets import make_dataset

from mfdist import storage
from mfdist.errors import DataError
from mfdist.results import id_lookup
from mfdist.results.exported_model import ExportedModel, model_path, write_card, write_model
from mfdist.results.id_lookup import IdLookup
from mfdist.results.ranking_metrics import FIGURES

CONFIG = {"model": "mf_advanced", "dim": 6, "bias": True, "sigmoid": True, "sigmoid_range": [0.5, 5.5], "cold": "own"}
PLAIN = {"model": "mf", "dim": 6, "bias": False, "sigmoid": False, "sigmoid_range": None, "cold": "own"}


def random_tables(dataset, biases=True, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    users, items = dataset.manifest.num_users, dataset.manifest.num_items
    shapes = {"user_embedding": (users, dim), "item_embedding": (items, dim)}
    if biases:
        shapes |= {"user_bias": (users,), "item_bias": (items,), "offset": (1,)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def in_chunks(tables, size=7):
    """The form that write_model takes: chunks come out of a generator, so that nothing can be read twice."""
    return {name: (table.shape, chunks_of(table, size)) for name, table in tables.items()}


def chunks_of(table, size):
    for first in range(0, len(table), size):
        yield table[first : first + size]


def export(run, dataset, config=None, **kwargs):
    config = CONFIG if config is None else config
    tables = random_tables(dataset, config["bias"], **kwargs)
    write_model(str(run), in_chunks(tables), config, dataset)
    return tables


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=300, lanes=3, val_rows=60)


def test_safetensors_reads_the_same_bits(tmp_path, dataset):
    tables = export(tmp_path / "run", dataset)
    loaded = safetensors.numpy.load_file(model_path(str(tmp_path / "run"), "model.safetensors"))
    assert set(loaded) == set(tables)
    for name, table in tables.items():
        assert loaded[name].dtype == np.float32 and loaded[name].shape == table.shape
        assert loaded[name].tobytes() == table.tobytes()


def test_our_reader_maps_the_same_bits_of_a_foreign_container(tmp_path, dataset):
    tables = export(tmp_path / "run", dataset)
    safetensors.numpy.save_file(tables, model_path(str(tmp_path / "run"), "model.safetensors"))
    model = ExportedModel.open(str(tmp_path / "run"))
    assert model.user_embedding.tobytes() == tables["user_embedding"].tobytes()
    assert model.item_bias.tobytes() == tables["item_bias"].tobytes()


def test_only_existing_tensors_are_written(tmp_path, dataset):
    export(tmp_path / "run", dataset, PLAIN)
    loaded = safetensors.numpy.load_file(model_path(str(tmp_path / "run"), "model.safetensors"))
    assert set(loaded) == {"user_embedding", "item_embedding"}


def test_tables_are_streamed_never_held(tmp_path):
    dataset = make_dataset(tmp_path / "data", rows=300, lanes=3, users=100_000)
    user_bytes = 100_000 * 64 * 4
    tables = random_tables(dataset, biases=False, dim=64)
    made = (np.ones((1000, 64), np.float32) for _ in range(100))  # 25 MB in all
    given = in_chunks(tables) | {"user_embedding": ((100_000, 64), made)}
    tracemalloc.start()
    try:
        write_model(str(tmp_path / "run"), given, PLAIN | {"dim": 64}, dataset)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < user_bytes / 5
    assert sorted(os.listdir(tmp_path / "run" / "model")) == [
        "README.md", "config.json", "items.parquet", "model.safetensors", "users.parquet"]  # fmt: skip


def test_ids_stand_beside_the_tables(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    for side, count in (("users", dataset.manifest.num_users), ("items", dataset.manifest.num_items)):
        table = pq.read_table(model_path(str(tmp_path / "run"), f"{side}.parquet"))
        assert table.column_names == ["row", "id"] and table["row"].to_pylist() == list(range(count))
        assert table["id"].to_pylist() == dataset.ids(side).to_pylist()


def test_config_says_what_a_reader_needs(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    config = json.loads(storage.read_text(model_path(str(tmp_path / "run"), "config.json")))
    manifest = dataset.manifest
    assert config["dataset"]["fingerprint"] == manifest.fingerprint
    assert config["rating_scale"] == [1.0, 5.0] and config["global_mean"] == manifest.global_mean
    for key in ("model", "dim", "bias", "sigmoid", "sigmoid_range", "cold", "rating_step", "format_version"):
        assert key in config


@pytest.mark.parametrize("config", [CONFIG, PLAIN, CONFIG | {"sigmoid": False, "model": "svd"}])
def test_prediction_is_the_formula(tmp_path, dataset, config):
    tables = export(tmp_path / "run", dataset, config)
    model = ExportedModel.open(str(tmp_path / "run"))
    rng = np.random.default_rng(1)
    user = rng.integers(0, model.num_users, 200_000)  # several blocks
    item = rng.integers(0, model.num_items, 200_000)
    double = {name: table.astype(np.float64) for name, table in tables.items()}
    score = (double["user_embedding"][user] * double["item_embedding"][item]).sum(1)
    if config["bias"]:
        score += double["user_bias"][user] + double["item_bias"][item] + double["offset"][0]
    expected = 0.5 + 5 / (1 + np.exp(-score)) if config["sigmoid"] else score
    np.testing.assert_allclose(model.predict(user, item), expected, atol=2e-6)


def test_unknown_ids_fall_back_on_the_known_side(tmp_path, dataset):
    tables = export(tmp_path / "run", dataset, CONFIG | {"sigmoid": False})
    model = ExportedModel.open(str(tmp_path / "run"))
    found = model.predict(np.array([-1, 3, -1]), np.array([2, -1, -1]))
    offset = tables["offset"][0]
    expected = [offset + tables["item_bias"][2], offset + tables["user_bias"][3], offset]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_unknown_ids_get_the_training_mean_without_biases(tmp_path, dataset):
    export(tmp_path / "run", dataset, PLAIN)
    model = ExportedModel.open(str(tmp_path / "run"))
    found = model.predict(np.array([-1, 3, 3]), np.array([2, -1, 2]))
    assert found[:2].tolist() == [dataset.manifest.global_mean] * 2 and found[2] != found[0]


def test_rows_and_ids_are_inverse(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    model = ExportedModel.open(str(tmp_path / "run"))
    assert model.rows_of("users", ["u5", "nobody", "u0", "u5"]).tolist() == [5, -1, 0, 5]
    assert model.rows_of("items", []).tolist() == []
    assert model.ids("items", 3, 6).to_pylist() == ["i3", "i4", "i5"]


@pytest.mark.parametrize("bits", [64, 3])
def test_a_lookup_finds_what_a_scan_finds(monkeypatch, bits):
    """Texts of any length, repeated and absent; where hashes collide there is no table."""
    true = id_lookup._hashed
    monkeypatch.setattr(id_lookup, "_hashed", lambda texts: true(texts) >> np.uint64(64 - bits))
    texts = ["", "a", "ä" * 40, "x" * 7, "x" * 8, "x" * 9, *(f"id {k}" for k in range(500))]
    lookup = IdLookup.of(pa.chunked_array([texts[:3], texts[3:400], texts[400:]]))
    assert (lookup is None) == (bits < 64)
    if lookup is not None:
        wanted = [*texts[::-1], "nobody", "id 500", "a", "X" * 8]
        expected = [texts.index(text) if text in texts else -1 for text in wanted]
        assert lookup.rows(pa.array(wanted)).tolist() == expected
        assert lookup.rows(pa.array(wanted).slice(3, 9)).tolist() == expected[3:12]
        assert lookup.rows(pa.array([], pa.string())).tolist() == []


def test_a_hash_that_another_id_has_is_not_that_id(monkeypatch):
    lookup = IdLookup.of(pa.chunked_array([["a", "b"]]))
    true = id_lookup._hashed
    monkeypatch.setattr(id_lookup, "_hashed", lambda texts: np.repeat(true(pa.array(["b"])), len(texts)))
    assert lookup.rows(pa.array(["stranger", "b"])).tolist() == [-1, 1]


def test_the_second_question_is_answered_by_the_table(tmp_path, dataset, monkeypatch):
    export(tmp_path / "run", dataset)
    model = ExportedModel.open(str(tmp_path / "run"))
    asked = ["u5", "nobody", "u0", "u5"]
    first = model.rows_of("users", asked)
    monkeypatch.setattr(pc, "index_in", lambda *_, **__: pytest.fail("the vocabulary was scanned again"))
    assert model.rows_of("users", asked).tolist() == first.tolist() == [5, -1, 0, 5]


def test_a_failing_producer_leaves_no_model(tmp_path, dataset):
    run = str(tmp_path / "run")
    export(run, dataset)
    before = storage.read_bytes(model_path(run, "model.safetensors"))
    tables = random_tables(dataset, seed=1)

    def broken():
        yield tables["item_embedding"][:4]
        raise OSError("no space")

    given = in_chunks(tables) | {"item_embedding": (tables["item_embedding"].shape, broken())}
    with pytest.raises(OSError, match="no space"):
        write_model(run, given, CONFIG, dataset)
    assert storage.read_bytes(model_path(run, "model.safetensors")) == before
    assert not [name for name in os.listdir(tmp_path / "run" / "model") if name.endswith(".tmp")]
    with pytest.raises(DataError, match="no exported model"):
        ExportedModel.open(run)


def test_a_producer_of_too_few_rows_is_our_own_bug(tmp_path, dataset):
    tables = random_tables(dataset)
    given = in_chunks(tables) | {"user_bias": (tables["user_bias"].shape, [tables["user_bias"][:-1]])}
    with pytest.raises(AssertionError, match="user_bias"):
        write_model(str(tmp_path / "run"), given, CONFIG, dataset)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def scribble(path):
    path.write_bytes(b"\xff" * 64)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, scribble, empty, os.unlink])
def test_a_damaged_container_is_named(tmp_path, dataset, damage):
    export(tmp_path / "run", dataset)
    damage(tmp_path / "run" / "model" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        ExportedModel.open(str(tmp_path / "run"))


def test_a_container_of_another_shape_is_refused(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    path = tmp_path / "run" / "model" / "config.json"
    path.write_text(path.read_text().replace('"dim": 6', '"dim": 7'))
    with pytest.raises(DataError, match="user_embedding"):
        ExportedModel.open(str(tmp_path / "run"))


@pytest.mark.parametrize("text", ["{", '{"format_version": 99}'])
def test_an_unreadable_config_is_refused(tmp_path, dataset, text):
    export(tmp_path / "run", dataset)
    (tmp_path / "run" / "model" / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        ExportedModel.open(str(tmp_path / "run"))


def test_any_url_will_do(tmp_path, dataset):
    run = f"memory://{uuid.uuid4().hex}/run"
    tables = export(run, dataset)
    model = ExportedModel.open(run)
    assert model.item_embedding.tobytes() == tables["item_embedding"].tobytes()
    assert model.rows_of("users", ["u7"]).tolist() == [7]


def test_an_object_store_gets_whole_objects_or_none(dataset, monkeypatch):
    server = pytest.importorskip("moto.server")
    for key, value in (("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(key, value)
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        fsspec.filesystem("s3").mkdir("exports")
        tables = export("s3://exports/run", dataset)
        model = ExportedModel.open("s3://exports/run")
        assert model.user_embedding.tobytes() == tables["user_embedding"].tobytes()
        big = os.urandom(1 << 20) * 12  # more than one part of a multipart upload
        with storage.open_write("s3://exports/big") as stream:
            for first in range(0, len(big), 1 << 20):
                stream.write(big[first : first + (1 << 20)])
        assert storage.read_bytes("s3://exports/big") == big
        for size in (10, len(big)):
            with pytest.raises(OSError, match="broken"):
                with storage.open_write("s3://exports/never") as stream:
                    stream.write(big[:size])
                    raise OSError("broken")
            assert not storage.exists("s3://exports/never")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # it remembers this server's address
        store.stop()


def test_the_card_carries_the_results(tmp_path, dataset):
    run = str(tmp_path / "run")
    export(run, dataset)
    card = storage.read_text(model_path(run, "README.md"))
    assert "0.5 + (5.5 - 0.5) * sigmoid(<p_u, q_i> + b_u + b_i + offset)" in card and "## Results" not in card
    lists = dict.fromkeys(FIGURES, 0.25)
    report = {"final": {"epoch": 9, "val_rmse_clipped": 1.29431, "how_chosen": "last epoch"},
              "ranking": {**lists, "popularity": dict.fromkeys(FIGURES, 0.5), "users": 9, "of_users": 9,
                          "threshold": 4},
              "floors": {"global_mean": {"rmse": 1.38, "mae": 1.09}},
              "dataset": {"name": "test", "num_ratings": {"train": 300, "val": 60}}, "job": "train", "world_size": 2,
              "config": {"lr": 0.1}, "versions": {}, "wall_seconds": 7.0, "device": "cpu"}  # fmt: skip
    write_card(run, report)
    card = storage.read_text(model_path(run, "README.md"))
    assert "1.2943" in card and "global mean | 1.3800 | 1.0900" in card and "last epoch" in card
    assert "| **this model** | 0.2500" in card and "rank below the most popular items" in card

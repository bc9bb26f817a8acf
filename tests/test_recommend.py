"""Recommendations: the best items of all pairs, in order, the same from any number of ranks; mistakes explained."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import make_dataset, training_rows
from ranks import run_ranks
from test_evaluate import job, write_run
from test_export import PLAIN

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.results.export import ExportedModel
from mfdist.results.recommend import RecommendConfig, _share, recommend


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=1200, lanes=5, val_rows=100, users=150, items=60)


@pytest.fixture
def run(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    return str(tmp_path / "run")


def expected(run, dataset, users, k, exclude_seen):
    """(user_id, item_id, rank) in order, by sorting every item of every user."""
    model, rows = ExportedModel.open(run), training_rows(dataset).astype(int)
    lines = []
    for user in users:
        score = model.predict(np.full(60, user), np.arange(60))
        if exclude_seen:
            score[rows[rows[:, 0] == user][:, 1]] = -np.inf
        best = np.argsort(-score, kind="stable")[:k]
        lines += [(f"u{user}", f"i{item}", place + 1) for place, item in enumerate(best) if score[item] > -np.inf]
    return lines


def lines_of(path):
    table = pq.read_table(path)
    assert table.column_names == ["user_id", "item_id", "rank", "score"]
    return [tuple(row.values())[:3] for row in table.to_pylist()]


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_job_writes_the_best_items_by_user_and_rank(tmp_path, dataset, run, exclude_seen, capsys):
    out = str(tmp_path / "out.parquet")
    flags = ["--run-dir", run, "--out", out, "--top-k", "7", "--device", "cpu"]
    assert job("recommend").main(flags + ["--exclude-seen"] * exclude_seen) == 0
    assert lines_of(out) == expected(run, dataset, range(150), 7, exclude_seen)
    assert "150 users" in capsys.readouterr().out
    assert [name for name in os.listdir(tmp_path) if name.startswith("out")] == ["out.parquet"]


def test_scores_are_predicted_ratings(tmp_path, run):
    out = str(tmp_path / "out.parquet")
    recommend(RecommendConfig(run_dir=run, out=out), World.alone(), None)
    model, table = ExportedModel.open(run), pq.read_table(out)
    pairs = [np.array([int(name[1:]) for name in table[side].to_pylist()]) for side in ("user_id", "item_id")]
    np.testing.assert_allclose(table["score"].to_numpy(), model.predict(*pairs), atol=1e-5)


def on_ranks(world, run, data, *outs):
    return [
        recommend(RecommendConfig(run_dir=run, out=out, exclude_seen=True), world, Dataset.open(data)) for out in outs
    ]


def test_three_ranks_write_what_one_writes(tmp_path, dataset, run):
    one, three, parts = (str(tmp_path / name) for name in ("one.parquet", "three.parquet", "parts"))
    assert run_ranks(1, on_ranks, run, dataset.path, one) == [[150]]
    assert run_ranks(3, on_ranks, run, dataset.path, three, parts) == [[150, 150]] * 3
    assert pq.read_table(one).equals(pq.read_table(three))
    assert pq.read_table(one).equals(pq.read_table(parts))
    assert sorted(os.listdir(parts)) == [f"part-0000{rank}.parquet" for rank in range(3)]
    run_ranks(1, on_ranks, run, dataset.path, parts)
    assert sorted(os.listdir(parts)) == ["part-00000.parquet"], "a part of an earlier run is not a result of this one"


def test_an_appended_lane_keeps_the_order(tmp_path, dataset, run, monkeypatch):
    """A lane with two ranges of users: order is that of user rows, and what was seen is still left out."""
    manifest = Dataset.open(dataset.path).manifest
    lanes = list(manifest.lanes)
    first, second = lanes[0].user_ranges[0], lanes[1].user_ranges[0]
    joined = type(lanes[0])(user_ranges=(second, first), train_rows=lanes[0].train_rows + lanes[1].train_rows,
                            val_rows=0, files=lanes[0].files + lanes[1].files)  # fmt: skip
    object.__setattr__(manifest, "lanes", (joined, *lanes[2:]))
    changed = Dataset.open(dataset.path)
    changed.manifest = manifest
    out = str(tmp_path / "out.parquet")
    recommend(RecommendConfig(run_dir=run, out=out, top_k=4, exclude_seen=True), World.alone(), changed)
    assert lines_of(out) == expected(run, dataset, range(150), 4, True)


@pytest.mark.parametrize("form", ["text", "parquet"])
def test_a_file_of_users(tmp_path, dataset, run, form):
    names = ["u77", "u3", "stranger", "u77"]
    if form == "text":
        (tmp_path / "users").write_text("\ufeff" + "\r\n".join(names) + "\n\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"other": [1, 2, 3, 4], "user_id": names}), tmp_path / "users")
    out = str(tmp_path / "out.parquet")
    config = RecommendConfig(run_dir=run, out=out, users=str(tmp_path / "users"), top_k=5)
    assert recommend(config, World.alone(), None) == 3
    found = lines_of(out)
    assert found[:10] == expected(run, dataset, [3, 77], 5, False)
    best = np.argsort(-ExportedModel.open(run).item_bias, kind="stable")[:5]
    assert found[10:] == [("stranger", f"i{item}", place + 1) for place, item in enumerate(best)]


def test_strangers_are_refused_by_a_model_without_biases(tmp_path, dataset):
    write_run(tmp_path / "mf", dataset, PLAIN)
    (tmp_path / "users").write_text("u1\nstranger\n")
    config = RecommendConfig(
        run_dir=str(tmp_path / "mf"), out=str(tmp_path / "o.parquet"), users=str(tmp_path / "users")
    )
    with pytest.raises(UsageError, match="'stranger'"):
        recommend(config, World.alone(), None)
    assert not (tmp_path / "o.parquet").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"", "no user ids"), (b"\xff\xfe\x00x", "neither"), (b"PAR1 and no more", "neither")],
)
def test_bad_user_files_are_explained(tmp_path, run, content, words):
    if content is not None:
        (tmp_path / "users").write_bytes(content)
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "out.parquet"), users=str(tmp_path / "users"))
    with pytest.raises(UsageError, match=words):
        recommend(config, World.alone(), None)


def test_seen_items_of_another_dataset_are_refused(tmp_path, run):
    other = make_dataset(tmp_path / "other", rows=100, lanes=2, seed=3)
    flags = ["--run-dir", run, "--out", str(tmp_path / "o.parquet"), "--exclude-seen", "--data", other.path]
    with pytest.raises(UsageError, match="was not trained on"):
        job("recommend").main([*flags, "--device", "cpu"])


@pytest.mark.parametrize("flag", ["run_dir", "out"])
def test_required_flags(flag):
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}"):
        RecommendConfig(**({"run_dir": "r", "out": "o"} | {flag: ""}))


def test_a_failing_rank_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.setattr("mfdist.results.recommend.TopItems.of", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        recommend(RecommendConfig(run_dir=run, out=str(tmp_path / "out.parquet")), World.alone(), None)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("out")]


@pytest.mark.parametrize("sizes", [[], [5], [0, 0, 3], [1] * 10, [100, 1, 1, 1], [3, 0, 0, 9, 2, 7]])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_segment_has_one_rank(sizes, world_size):
    shares = [_share(sizes, rank, world_size) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(len(sizes)))

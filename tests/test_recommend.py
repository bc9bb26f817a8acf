"""Recommendations: the best items of all pairs, in order, the same from any number of ranks; mistakes explained."""

from __future__ import annotations

import os
import re
import signal

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
from mfdist.errors import StopRequested, UsageError
from mfdist.log import Console
from mfdist.results.exported_model import ExportedModel
from mfdist.results.part_files import Parts
from mfdist.results.recommend import RecommendConfig, recommend
from mfdist.results.top_items import TopItems


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
    assert job("recommend").main(flags + ["--include-seen"] * (not exclude_seen)) == 0
    assert lines_of(out) == expected(run, dataset, range(150), 7, exclude_seen)
    assert "150 users" in capsys.readouterr().out
    assert [name for name in os.listdir(tmp_path) if name.startswith("out")] == ["out.parquet"]


def test_scores_are_predicted_ratings(tmp_path, run):
    out = str(tmp_path / "out.parquet")
    recommend(RecommendConfig(run_dir=run, out=out, include_seen=True), World.alone(), None)
    model, table = ExportedModel.open(run), pq.read_table(out)
    pairs = [np.array([int(name[1:]) for name in table[side].to_pylist()]) for side in ("user_id", "item_id")]
    np.testing.assert_allclose(table["score"].to_numpy(), model.predict(*pairs), atol=1e-5)


def on_ranks(world, run, data, *outs):
    return [recommend(RecommendConfig(run_dir=run, out=out), world, Dataset.open(data)).users for out in outs]


def test_three_ranks_write_what_one_writes(tmp_path, dataset, run):
    one, three, parts = (str(tmp_path / name) for name in ("one.parquet", "three.parquet", "parts"))
    assert run_ranks(1, on_ranks, run, dataset.path, one) == [[150]]
    assert run_ranks(3, on_ranks, run, dataset.path, three, parts) == [[150, 150]] * 3
    assert pq.read_table(one).equals(pq.read_table(three))
    assert pq.read_table(one).equals(pq.read_table(parts))
    assert sorted(os.listdir(parts)) == [f"part-0000{lane}.parquet" for lane in range(5)]
    (tmp_path / "parts/part-00005.parquet").touch()
    run_ranks(1, on_ranks, run, dataset.path, parts)
    assert len(os.listdir(parts)) == 5, "a part of an earlier run is not a result of this one"


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
    recommend(RecommendConfig(run_dir=run, out=out, top_k=4), World.alone(), changed)
    assert lines_of(out) == expected(run, dataset, range(150), 4, True)


@pytest.mark.parametrize("form", ["text", "parquet"])
def test_a_file_of_users(tmp_path, dataset, run, form):
    names = ["u77", "u3", "stranger", "u77"]
    if form == "text":
        (tmp_path / "users").write_text("\ufeff" + "\r\n".join(names) + "\n\n", encoding="utf-8")
    else:
        pq.write_table(pa.table({"other": [1, 2, 3, 4], "user_id": names}), tmp_path / "users")
    out = str(tmp_path / "out.parquet")
    config = RecommendConfig(run_dir=run, out=out, users=str(tmp_path / "users"), top_k=5,
                             include_seen=True)  # fmt: skip
    assert recommend(config, World.alone(), None) == (3, 1)
    found = lines_of(out)
    assert found[:10] == expected(run, dataset, [3, 77], 5, False)
    best = np.argsort(-ExportedModel.open(run).item_bias, kind="stable")[:5]
    assert found[10:] == [("stranger", f"i{item}", place + 1) for place, item in enumerate(best)]


def test_strangers_are_refused_by_a_model_without_biases(tmp_path, dataset):
    write_run(tmp_path / "mf", dataset, PLAIN)
    (tmp_path / "users").write_text("u1\nstranger\n")
    config = RecommendConfig(
        run_dir=str(tmp_path / "mf"), out=str(tmp_path / "o.parquet"), users=str(tmp_path / "users"),
        include_seen=True,
    )  # fmt: skip
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
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "out.parquet"), users=str(tmp_path / "users"),
                             include_seen=True)  # fmt: skip
    with pytest.raises(UsageError, match=words):
        recommend(config, World.alone(), None)


def test_seen_items_of_another_dataset_are_refused(tmp_path, run):
    other = make_dataset(tmp_path / "other", rows=100, lanes=2, seed=3)
    flags = ["--run-dir", run, "--out", str(tmp_path / "o.parquet"), "--data", other.path]
    with pytest.raises(UsageError, match="was not trained on"):
        job("recommend").main([*flags, "--device", "cpu"])


@pytest.mark.parametrize("flag", ["run_dir", "out"])
def test_required_flags(flag):
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}"):
        RecommendConfig(**({"run_dir": "r", "out": "o"} | {flag: ""}))


def test_a_failing_rank_leaves_nothing_half_written(tmp_path, run, monkeypatch):
    monkeypatch.setattr("mfdist.results.recommend.TopItems.of", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "out.parquet"), include_seen=True)
    with pytest.raises(OSError, match="broken"):
        recommend(config, World.alone(), None)
    assert os.listdir(tmp_path / "out.parquet.parts") == ["request.json"]
    assert not (tmp_path / "out.parquet").exists()


# Filters, endings, stops ----------------------------------------------------------------------------


def recommended(run, dataset, out, **flags):
    config = RecommendConfig(run_dir=run, out=str(out), **({"top_k": 4} | flags))
    recommend(config, World.alone(), dataset if config.needs_dataset else None)
    return lines_of(out)


def filtered(run, dataset, users, k, keep):
    """What is expected where ``keep(user, item)`` says which items may be recommended."""
    found = []
    for user in users:
        mine = [line for line in expected(run, dataset, [user], 60, True) if keep(user, int(line[1][1:]))][:k]
        found += [(line[0], line[1], place + 1) for place, line in enumerate(mine)]
    return found


def test_csv_has_the_same_rows(tmp_path, dataset, run):
    parquet = recommended(run, dataset, tmp_path / "a.parquet")
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "a.csv"), top_k=4)
    recommend(config, World.alone(), dataset)
    head, *rows = (tmp_path / "a.csv").read_text().splitlines()
    assert head == "user_id,item_id,rank,score"
    assert [(u, i, int(r)) for u, i, r, _ in (row.split(",") for row in rows)] == parquet
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.parquet", "data", "run"]


def test_other_endings_are_refused():
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        RecommendConfig(run_dir="r", out="best.xlsx")


def test_catalogue_lists_and_a_least_number_of_ratings(tmp_path, dataset, run):
    (tmp_path / "allow.txt").write_text("".join(f"i{item}\n" for item in range(40)) + "nobody\n")
    pq.write_table(pa.table({"item_id": [f"i{item}" for item in range(0, 60, 3)]}), tmp_path / "deny.parquet")
    counts = dataset.counts("items")
    least = int(np.median(counts))
    found = recommended(run, dataset, tmp_path / "o.parquet", allow=str(tmp_path / "allow.txt"),
                        deny=str(tmp_path / "deny.parquet"), min_item_ratings=least)  # fmt: skip
    keep = lambda user, item: item < 40 and item % 3 and counts[item] >= least  # noqa: E731
    assert found == filtered(run, dataset, range(150), 4, keep)


def test_lists_of_one_user(tmp_path, dataset, run):
    (tmp_path / "allow.csv").write_text("item_id,user_id\ni3,u5\ni7,u5\nnobody,u6\ni9,stranger\n")
    (tmp_path / "deny.csv").write_text('user_id,item_id\n"u5",i7\nu8,i2\nu8,i2\n')
    (tmp_path / "users").write_text("u5\nu6\nu8\nu9\nstranger\n")
    found = recommended(run, dataset, tmp_path / "o.parquet", allow=str(tmp_path / "allow.csv"),
                        deny=str(tmp_path / "deny.csv"), users=str(tmp_path / "users"))  # fmt: skip
    keep = lambda user, item: {5: item == 3, 6: False, 8: item != 2, 9: True}[user]  # noqa: E731
    assert found[:-1] == filtered(run, dataset, [5, 6, 8, 9], 4, keep)
    assert found[-1] == ("stranger", "i9", 1)


def test_filters_that_leave_nothing_are_explained(tmp_path, dataset, run):
    (tmp_path / "none").write_text("nobody\n")
    with pytest.raises(UsageError, match="none of its 1 items was known"):
        recommended(run, dataset, tmp_path / "o.parquet", allow=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="leave no item"):
        recommended(run, dataset, tmp_path / "o.parquet", min_item_ratings=10**6)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("o.")]


@pytest.mark.parametrize("content", ["", "nobody\n", "user_id,item_id\n", "user_id,item_id\nu1,nobody\n"])
def test_a_deny_list_of_nothing_known_leaves_out_nothing(tmp_path, dataset, run, content):
    (tmp_path / "none").write_text(content)
    found = recommended(run, dataset, tmp_path / "o.parquet", deny=str(tmp_path / "none"))
    assert found == expected(run, dataset, range(150), 4, True)
    with pytest.raises(UsageError, match="items was known to training"):
        recommended(run, dataset, tmp_path / "p.parquet", allow=str(tmp_path / "none"))


def test_users_who_have_seen_all_have_no_rows_and_k_may_exceed_the_catalogue(tmp_path, dataset, run):
    (tmp_path / "allow.csv").write_text("user_id,item_id\n" + "".join(f"u{user},i0\n" for user in range(150)))
    rows = training_rows(dataset).astype(int)
    seen = set(rows[rows[:, 1] == 0][:, 0])
    found = recommended(run, dataset, tmp_path / "o.parquet", allow=str(tmp_path / "allow.csv"), top_k=1000)
    assert seen and {line[0] for line in found} == {f"u{user}" for user in range(150) if user not in seen}
    assert len(recommended(run, dataset, tmp_path / "o.parquet", include_seen=True, top_k=1000)) == 150 * 60


def test_unknown_users_are_left_out_or_refused(tmp_path, dataset, run):
    (tmp_path / "users").write_text("u1\nstranger\n")
    flags = {"run_dir": run, "out": str(tmp_path / "o.parquet"), "users": str(tmp_path / "users")}
    config = RecommendConfig(**flags, unknown_users="skip")
    assert recommend(config, World.alone(), dataset) == (1, 1)
    with pytest.raises(UsageError, match="'stranger'"):
        recommend(RecommendConfig(**flags, unknown_users="error"), World.alone(), dataset)


def test_a_stop_keeps_finished_parts_and_the_same_command_goes_on(tmp_path, dataset, run, monkeypatch):
    """The signal comes while the third part is made; the output is that of an undisturbed run, made of kept parts."""
    config = RecommendConfig(run_dir=run, out=str(tmp_path / "o.parquet"))
    recommend(config, World.alone(), dataset)
    undisturbed = (tmp_path / "o.parquet").read_bytes()
    (tmp_path / "o.parquet").unlink()
    calls, of = [], TopItems.of

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return of(*arguments)

    monkeypatch.setattr(TopItems, "of", stopped)
    with pytest.raises(StopRequested, match="SIGTERM") as stop:
        recommend(config, World.alone(), dataset)
    assert stop.value.exit_code == 75
    assert sorted(os.listdir(tmp_path / "o.parquet.parts")) == [
        "part-00000.parquet", "part-00001.parquet", "request.json"]  # fmt: skip
    recommend(config, World.alone(), dataset)
    assert len(calls) == 6, "parts 2 to 4 are made, 0 and 1 are not made again"
    assert (tmp_path / "o.parquet").read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["data", "o.parquet", "run"]


def test_parts_of_another_request_are_not_used(tmp_path, dataset, run, monkeypatch):
    monkeypatch.setattr(Parts, "join", lambda *_: None)
    recommend(RecommendConfig(run_dir=run, out=str(tmp_path / "o.parquet"), top_k=3), World.alone(), dataset)
    assert len(os.listdir(tmp_path / "o.parquet.parts")) == 6
    monkeypatch.undo()
    assert recommended(run, dataset, tmp_path / "o.parquet") == expected(run, dataset, range(150), 4, True)


def test_progress_says_rate_and_time_left(tmp_path, dataset, run, monkeypatch, capsys):
    monkeypatch.setattr("mfdist.log.PLAIN_INTERVAL_SECONDS", 0.0)
    recommend(RecommendConfig(run_dir=run, out=str(tmp_path / "o.csv")), World.alone(), dataset, Console())
    assert re.search(r"recommend \d+% \| [\d,.]+ (M )?users/s \| eta 00:", capsys.readouterr().out)

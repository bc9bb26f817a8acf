"""Lists are those of all pairs, and their figures those computed by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from datasets import make_dataset, training_rows, write_dataset
from ranks import run_ranks
from test_export import PLAIN, in_chunks
from written_runs import small_dataset, write_run

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.metrics import in_sample
from mfdist.results import ranking_metrics
from mfdist.results.exported_model import ExportedModel, write_model
from mfdist.results.item_lists import ItemLists
from mfdist.results.ranking import USERS, rank_metrics, ranked_users, top_of_model
from mfdist.results.ranking_metrics import gains
from mfdist.results.top_items import TopItems, seen_items


@pytest.fixture
def dataset(tmp_path):
    return small_dataset(tmp_path)


def brute_force(model, users, k, hidden):
    items = np.arange(model.num_items)
    found = []
    for user in users:
        score = model.predict(np.full(len(items), user), items)
        score[list(hidden[user])] = -np.inf
        found.append(np.lexsort((items, -score))[:k])
    return np.array(found)


@pytest.mark.parametrize("block", [7, 1020])
def test_top_items_are_those_of_all_pairs(tmp_path, dataset, monkeypatch, block):
    monkeypatch.setattr("mfdist.results.item_index.BATCH_USERS", block)
    write_run(tmp_path / "run", dataset)
    model = ExportedModel.open(str(tmp_path / "run"))
    first, end = dataset.manifest.lanes[1].user_ranges[0]
    users = np.arange(first, end)
    seen = seen_items(dataset, 1, users)
    rows = training_rows(dataset).astype(int)
    hidden = {user: set(rows[rows[:, 0] == user][:, 1]) for user in users}
    items, rating = TopItems(model).of(users, 10, seen)
    assert items.tolist() == brute_force(model, users, 10, hidden).tolist()
    flat_user = np.repeat(users, 10)
    np.testing.assert_allclose(rating.ravel(), model.predict(flat_user, items.ravel()), atol=1e-6)


def test_more_than_all_items_fill_up(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    items, rating = TopItems(ExportedModel.open(str(tmp_path / "run"))).of(np.array([0]), 100)
    assert sorted(items[0][:90]) == list(range(90)) and (items[0][90:] == -1).all() and np.isnan(rating[0][90:]).all()


def test_gains_by_hand():
    relevant = ItemLists(np.array([0, 2, 3, 5]), np.array([7, 9, 4, 4, 8]))
    found = gains(np.array([[9, 1, 7], [1, 2, 3], [1, 4, -1]]), relevant)
    assert found[0] == pytest.approx([(1 + 1 / np.log2(4)) / (1 + 1 / np.log2(3)), 1.0, 1.0])
    assert found[1].tolist() == [0, 0, 0]
    assert found[2] == pytest.approx([1 / np.log2(3) / (1 + 1 / np.log2(3)), 0.5, 0.5])


def test_a_perfect_ranking_scores_one(tmp_path):
    """Each user's only relevant item is the one whose factor matches."""
    users = 40
    val = {"user": np.arange(users, dtype=np.int32), "item": np.arange(users, dtype=np.int32),
           "rating": np.full(users, 4, np.float32)}  # fmt: skip
    train = {"user": np.arange(users, dtype=np.int32), "item": np.roll(np.arange(users, dtype=np.int32), 1),
             "rating": np.array([1, 5] * 20, np.float32)}  # fmt: skip
    dataset = write_dataset(tmp_path / "data", [[train]], [[val]], ranges=[(0, users)], num_items=users)
    eye = np.eye(users, dtype=np.float32)
    write_model(str(tmp_path / "run"), in_chunks({"user_embedding": eye, "item_embedding": eye}),
                PLAIN | {"dim": users}, dataset)  # fmt: skip
    found = ranking_of(tmp_path / "run", dataset)
    assert found["users"] == users and found["threshold"] == 4.0
    assert found["ndcg@10"] == 1.0 and found["recall@10"] == 1.0
    assert found["mrr@10"] == 1.0 and found["coverage@10"] == 1.0
    assert found["popularity"]["recall@10"] < 0.5 and found["popularity"]["coverage@10"] < 0.4


def ranking_of(run, dataset, users=USERS, **choice):
    top = partial(top_of_model, ExportedModel.open(str(run)))
    return rank_metrics(top, ranked_users(dataset, World.alone(), users, **choice), dataset, World.alone())


def test_a_ranking_by_hand(tmp_path):
    """Two lanes, three users. User 0 has seen item 0 and likes 2 and 4 (3 is rated too low), user 1 likes nothing, user
    2 likes 1. The model ranks items by 4, 3, 2, 1, 0 for everybody, popularity by 0, 1, 2, 3, 4."""

    def rows(user, item, rating):
        return {"user": np.array(user, np.int32), "item": np.array(item, np.int32),
                "rating": np.array(rating, np.float32)}  # fmt: skip

    train = [[rows([0, 1, 1], [0, 0, 1], [5, 1, 4])], [rows([2], [0], [2])]]
    val = [[rows([0, 0, 0, 1], [2, 4, 3, 2], [4, 5, 3.9, 1])], [rows([2], [1], [4])]]
    dataset = write_dataset(tmp_path / "data", train, val, ranges=[(0, 2), (2, 3)], num_items=5)
    write_model(str(tmp_path / "run"), in_chunks({"user_embedding": np.ones((3, 1), np.float32),
                "item_embedding": np.arange(5, dtype=np.float32)[:, None]}), PLAIN | {"dim": 1}, dataset)  # fmt: skip
    found = ranking_of(tmp_path / "run", dataset)
    discount = 1 / np.log2(np.arange(10) + 2)
    best = discount[0] + discount[1]
    # user 0 gets 4, 3, 2, 1: hits at 1 and 3; user 2 gets 4, 3, 2, 1: a hit at 4. By popularity: 1, 2, 3, 4 for both.
    assert found["users"] == found["of_users"] == 2 and found["threshold"] == 4.0
    assert found["ndcg@10"] == pytest.approx(((discount[0] + discount[2]) / best + discount[3]) / 2)
    assert found["recall@10"] == 1.0 and found["mrr@10"] == pytest.approx((1 + 1 / 4) / 2)
    assert found["coverage@10"] == 4 / 5 and found["popularity"]["coverage@10"] == 4 / 5
    assert found["popularity"]["ndcg@10"] == pytest.approx(((discount[1] + discount[3]) / best + 1) / 2)
    assert found["popularity"]["mrr@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert "below the most popular" in ranking_metrics.doubt_about(found)
    assert ranking_metrics.doubt_about(found | {"ndcg@10": found["popularity"]["ndcg@10"]}) == ""


def test_a_ranking_is_of_about_as_many_users_as_asked_for(tmp_path, dataset):
    whole = ranked_users(dataset, World.alone())
    few = ranked_users(dataset, World.alone(), 60)
    assert len(whole.users) == whole.of_users == few.of_users > 200
    assert 35 < len(few.users) < 85 and set(few.users) < set(whole.users)
    other = ranked_users(dataset, World.alone(), 60, seed=1)
    assert set(other.users) != set(few.users)
    place = np.searchsorted(whole.users, few.users)
    for part, of in ((few.relevant, whole.relevant), (few.seen, whole.seen)):
        assert [list(x) for x in of.of(place)] == [list(x) for x in part]
    sampled = ranked_users(dataset, World.alone(), sample=0.3)
    assert in_sample(sampled.users, 0.3).all() and 0 < len(sampled.users) < len(whole.users)


def ranking_on_ranks(world, path, run):
    dataset = Dataset.open(path)
    chosen = ranked_users(dataset, world, 80)
    return rank_metrics(partial(top_of_model, ExportedModel.open(run)), chosen, dataset, world)


def test_a_ranking_is_the_same_bits_on_any_ranks(tmp_path, dataset):
    write_run(tmp_path / "run", dataset)
    alone = run_ranks(1, ranking_on_ranks, dataset.path, str(tmp_path / "run"))
    assert run_ranks(3, ranking_on_ranks, dataset.path, str(tmp_path / "run")) == alone * 3
    assert 0 < alone[0]["ndcg@10"] < 1 and 0 < alone[0]["coverage@10"] < 1


def test_no_validation_row_is_no_ranking(tmp_path):
    dataset = make_dataset(tmp_path / "data", rows=50, lanes=2)
    write_run(tmp_path / "run", dataset)
    found = ranking_of(tmp_path / "run", dataset)
    assert found["users"] == 0 and found["ndcg@10"] is None and found["popularity"]["coverage@10"] is None
    assert ranking_metrics.doubt_about(found) == ""

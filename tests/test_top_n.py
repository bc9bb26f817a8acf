"""Top-N lists are exact: the defined score to the last bit, ties by item row, whatever is filtered or hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mfdist.kernels.dot_tiles import HAS_BYTES
from mfdist.kernels.top_n import key_of, row_of, score_of
from mfdist.results.item_index import ItemIndex
from mfdist.results.item_lists import ItemLists

FILTERS = [False, *([True] if HAS_BYTES else [])]


def fused(a, b, c):
    """float32 a * b + c, rounded once: the product is exact in float64, and its sum with c rounded to odd."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, towards), total).astype(np.float32)


def scores_of(users, items, bias):
    """float32 (users, items), as ``kernels.top_n`` defines a score."""
    total = np.broadcast_to(bias, (len(users), len(items)))
    for d in range(users.shape[1]):
        total = fused(users[:, d, None], items[None, :, d], total)
    return total + np.float32(0)


def brute_force(users, items, bias, k, hidden=None, rows=None):
    score = scores_of(users, items, bias).astype(np.float64)
    if rows is not None:
        score[:, np.setdiff1d(np.arange(len(items)), rows)] = -np.inf
    if hidden is not None:
        score[hidden.users, hidden.items] = -np.inf
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(score, order, 1)
    order = np.where(np.isneginf(found), -1, order)
    pad = ((0, 0), (0, k - order.shape[1]))
    return np.pad(order, pad, constant_values=-1), np.pad(found, pad, constant_values=-np.inf).astype(np.float32)


def tables(kind, users=70, items=1700, dim=9, seed=0):
    rng = np.random.default_rng(seed)
    p, q = (rng.standard_normal((n, dim)).astype(np.float32) for n in (users, items))
    bias = rng.standard_normal(items).astype(np.float32)
    if kind == "uneven":
        q *= rng.lognormal(0, 2, (items, 1)).astype(np.float32)
        p *= rng.lognormal(0, 2, (users, 1)).astype(np.float32)
        q[:, 0] *= 1000
    if kind == "ties":
        q, bias = q[rng.integers(0, 40, items)], bias[rng.integers(0, 2, items)]
        p[::9] = 0
    if kind == "nothing":
        q[:], bias[:] = 0, 0
    return p, q, None if kind == "no bias" else bias


@pytest.mark.parametrize("in_bytes", FILTERS)
@pytest.mark.parametrize("kind", ["even", "uneven", "ties", "nothing", "no bias"])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_lists_are_those_of_all_pairs_to_the_last_bit(in_bytes, kind, k):
    p, q, bias = tables(kind)
    norms = np.linalg.norm(p, axis=1)
    rows, scores = ItemIndex(q, bias, user_norms=norms, in_bytes=in_bytes, threads=2).search(p, k)
    expected = brute_force(p, q, np.zeros(len(q), np.float32) if bias is None else bias, k)
    assert rows.tolist() == expected[0].tolist()
    assert scores.tobytes() == (expected[1] + np.float32(0)).tobytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["even", "ties"])
def test_a_thousand_users_of_a_hundred_thousand_items(kind):
    """With ties about forty vectors and two biases stand for all the items: every list is decided by rows."""
    p, q, bias = tables(kind, users=1000, items=100_000, dim=32)
    rows, scores = ItemIndex(q, bias, user_norms=np.linalg.norm(p, axis=1)).search(p, 10)
    for first in range(0, 1000, 25):
        expected = brute_force(p[first : first + 25], q, bias, 10)
        assert rows[first : first + 25].tolist() == expected[0].tolist()
        assert scores[first : first + 25].tolist() == expected[1].tolist()


@pytest.mark.parametrize("in_bytes", FILTERS)
@pytest.mark.parametrize("dim", [1, 3, 4, 33, 130])
def test_any_number_of_factors(in_bytes, dim):
    p, q, bias = tables("even", users=20, items=700, dim=dim)
    rows, scores = ItemIndex(q, bias, in_bytes=in_bytes).search(p, 5)
    expected = brute_force(p, q, bias, 5)
    assert rows.tolist() == expected[0].tolist() and scores.tolist() == expected[1].tolist()


@pytest.mark.parametrize("in_bytes", FILTERS)
def test_hidden_listed_and_allowed_items(in_bytes):
    p, q, bias = tables("ties", users=30)
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 30, 9000), rng.integers(0, len(q), 9000)
    hidden = ItemLists.of_pairs(*pairs, 30)
    allowed = np.sort(rng.choice(len(q), 800, replace=False))
    index = ItemIndex(q, bias, rows=allowed, in_bytes=in_bytes)
    found = index.search(p, 12, hidden)
    expected = brute_force(p, q, bias, 12, hidden, allowed)
    assert found[0].tolist() == expected[0].tolist() and found[1].tolist() == expected[1].tolist()
    listed = ItemLists.of_pairs(rng.integers(0, 30, 300), rng.integers(0, len(q), 300), 30)
    mask = np.ones((30, len(q)), bool)
    mask[listed.users, listed.items] = False
    mask[hidden.users, hidden.items] = True
    user, item = np.nonzero(mask)
    expected = brute_force(p, q, bias, 12, ItemLists.of_pairs(user, item, 30), allowed)
    found = index.search(p, 12, hidden, listed)
    assert found[0].tolist() == expected[0].tolist()


def test_what_is_hidden_from_the_next_user_is_not_hidden_from_this_one():
    p, q = np.ones((2, 1), np.float32), np.array([[1], [2], [3]], np.float32)
    hidden = ItemLists(np.array([0, 1, 2]), np.array([0, 2]))
    assert ItemIndex(q, None).search(p, 2, hidden)[0].tolist() == [[2, 1], [1, 0]]


def test_nothing_to_find():
    p = np.ones((3, 2), np.float32)
    rows, scores = ItemIndex(np.empty((0, 2), np.float32), None).search(p, 4)
    assert (rows == -1).all() and np.isneginf(scores).all()
    rows, _ = ItemIndex(np.ones((5, 2), np.float32), None, rows=np.empty(0, np.int64)).search(p, 4)
    assert (rows == -1).all()
    assert ItemIndex(np.ones((5, 2), np.float32), None).search(p[:0], 4)[0].shape == (0, 4)


def test_neither_threads_nor_batches_nor_company_change_a_bit(monkeypatch):
    p, q, bias = tables("uneven", users=100)
    index = ItemIndex(q, bias, user_norms=np.ones(3), threads=1)
    whole = index.search(p, 10)
    monkeypatch.setattr("mfdist.results.item_index.BATCH_USERS", 7)
    threads = ItemIndex(q, bias, threads=3).search(p, 10)
    alone = [index.search(p[u : u + 1], 10) for u in range(100)]
    assert whole[0].tobytes() == threads[0].tobytes() == np.concatenate([a[0] for a in alone]).tobytes()
    assert whole[1].tobytes() == threads[1].tobytes() == np.concatenate([a[1] for a in alone]).tobytes()


def test_most_is_skipped_where_lengths_are_uneven():
    """Bounds are used: with a few long items hardly a pair is filtered."""
    from mfdist.kernels import top_n

    p, q, _ = tables("even", users=60, items=20_000)
    q[300:] *= 0.01
    index = ItemIndex(q, None, user_norms=np.linalg.norm(p, axis=1))
    heaps = np.zeros((60, 10), np.uint64)
    search = top_n.search_by_bytes if index.in_bytes else top_n.search_by_floats
    order = np.argsort(np.linalg.norm(p, axis=1))
    filtered = search(0, 10, index._users(p[order]), index._items, index._blocks, tuple(ItemLists.none(60)), heaps)
    assert 0 < filtered <= 2 * 60 * top_n.BLOCK


def test_keys_order_scores_and_then_rows():
    scores = np.array([-np.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 3e38], np.float32)
    keys = [int(key_of(score, 5)) for score in scores]
    assert keys == sorted(keys) and keys[3] == keys[4] and keys[0] == 0
    assert int(key_of(np.float32(2), 4)) > int(key_of(np.float32(2), 5))
    assert int(key_of(np.float32(np.nan), 5)) == 0
    for score in scores[1:]:
        key = np.uint64(key_of(score, 4_000_000_000))
        assert score_of(key) == score and row_of(key) == 4_000_000_000


def test_candidates_of_a_device_give_the_same_lists(monkeypatch):
    """The filter of GPUs, on this processor: candidates, and users searched anew where ties reach beyond them."""
    from mfdist.results import item_index_gpu

    monkeypatch.setattr(item_index_gpu, "ITEM_BLOCK", 300)
    for kind in ("even", "ties", "uneven"):
        p, q, bias = tables(kind)
        hidden = ItemLists.of_pairs(np.arange(70).repeat(9), np.arange(630) % 300, 70)
        index = ItemIndex(q, bias)
        expected = index.search(p, 10, hidden)
        index._filter = item_index_gpu.GpuFilter(index.factors, index.bias, torch.device("cpu"))
        found = index.search(p, 10, hidden)
        assert found[0].tobytes() == expected[0].tobytes() and found[1].tobytes() == expected[1].tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["even", "uneven", "ties"])
def test_a_gpu_gives_the_same_bytes(kind):
    p, q, bias = tables(kind, users=500, items=200_000, dim=32)
    here, there = ItemIndex(q, bias).search(p, 10), ItemIndex(q, bias, device=torch.device("cuda")).search(p, 10)
    assert here[0].tobytes() == there[0].tobytes() and here[1].tobytes() == there[1].tobytes()

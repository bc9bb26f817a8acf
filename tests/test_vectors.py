"""Vectors in numba's kernels: every operation against numpy; kernels of a constant shape against general ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import make_dataset
from numba import njit
from ranks import run_ranks
from test_train import config, exported, train_all

from mfdist.kernels import row_arithmetic
from mfdist.kernels.vectors import LANES, ONE, SIXTEEN, fma, load, root, spread, store, total
from mfdist.model import cpu_step

WIDTH = 37  # two vectors and five columns
A, B, C = np.random.default_rng(7).uniform(0.5, 2, (3, WIDTH)).astype(np.float32)


@njit
def lane_by_lane(a: Any, b: Any, c: Any, out: Any) -> Any:
    two = np.float32(2)
    for d in range(0, row_arithmetic.full(a.size), LANES):
        x, y, z = load(SIXTEEN, a, d), load(SIXTEEN, b, d), load(SIXTEEN, c, d)
        store(SIXTEEN, out, d, (fma(x, y, z) / root(x) - two * y + spread(SIXTEEN, two)) * (two - z) / two)
    for d in range(row_arithmetic.full(a.size), a.size):
        x, y, z = load(ONE, a, d), load(ONE, b, d), load(ONE, c, d)
        store(ONE, out, d, (fma(x, y, z) / root(x) - two * y + spread(ONE, two)) * (two - z) / two)
    return total(load(SIXTEEN, a, 3))


def test_operations_are_numpys_in_every_lane():
    out = np.zeros(WIDTH + 1, np.float32)
    added = lane_by_lane(A, B, C, out[:WIDTH])
    a, b, c = (x.astype(np.float64) for x in (A, B, C))
    expected = ((a * b + c) / np.sqrt(a) - 2 * b + 2) * (2 - c) / 2
    np.testing.assert_allclose(out[:WIDTH], expected, rtol=1e-5, atol=1e-6)
    assert out[WIDTH] == 0  # nothing is written behind the last column
    np.testing.assert_allclose(added, A[3 : 3 + LANES].sum(dtype=np.float64), rtol=1e-6)


@njit
def exponentials(x: Any, out: Any) -> None:
    for k in range(x.size):
        out[k] = row_arithmetic.exponential(x[k])


def test_exponential_is_exact_to_two_units():
    x = np.concatenate([np.linspace(-87, 88, 200_001), [0.0, -1e-30, 1e-30]]).astype(np.float32)
    out = np.empty_like(x)
    exponentials(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=2 * 2.0**-23)
    extreme, found = np.array([-np.inf, -1e4, 1e4, np.inf], np.float32), np.empty(4, np.float32)
    exponentials(extreme, found)
    assert np.isfinite(found).all() and found[0] <= 2e-38 and found[3] > 1e38


def test_rows_of_a_buffer_begin_where_cache_lines_do():
    for width in (1, 16, 33):
        rows = row_arithmetic.row_buffer(5, width)
        assert rows.shape[1] >= width and rows.flags.c_contiguous
        assert all(row.ctypes.data % 64 == 0 for row in rows)


@pytest.mark.slow
def test_kernels_of_a_constant_shape_give_the_same_bits(tmp_path, monkeypatch):
    """Which of them runs depends on the size of the data and must change nothing."""
    data = str(tmp_path / "data")
    make_dataset(data, rows=1500, lanes=7, val_rows=200, users=150, items=60, row_group=64)
    models = []
    for name, least in (("general", 1_000_000), ("own", 0)):
        monkeypatch.setattr(cpu_step, "OWN_KERNELS_RATINGS", least)
        run = tmp_path / name
        run_ranks(1, train_all, [config(data, run, emb_dim=20, batch_size=128, epochs=2)])
        models.append(exported(run))
    for key, tensor in models[0].items():
        np.testing.assert_array_equal(tensor, models[1][key], err_msg=key)

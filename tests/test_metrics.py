"""Metrics are float64 sums that add in any grouping, and the rounding is the vignette's step function."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.metrics import (
    BLOCKS,
    COLUMNS,
    SLICES,
    SliceSums,
    block_of,
    bootstrap_interval,
    clip_to_scale,
    round_to_scale,
)


def vignette_stars(value: float) -> int:
    """The step function to whole stars, written out."""
    if value < 1.5:
        return 1
    if value < 2.5:
        return 2
    if value < 3.5:
        return 3
    if value < 4.5:
        return 4
    return 5


def test_rounding_is_the_step_function_to_whole_stars():
    values = np.concatenate([np.linspace(-2, 8, 1001), [1.5, 2.5, 3.5, 4.5, np.nextafter(2.5, 0), 1.0, 5.0]])
    assert round_to_scale(values, 1, 5, 1).tolist() == [vignette_stars(v) for v in values]


@pytest.mark.parametrize(
    ("value", "low", "high", "step", "expected"),
    [(3.74, 0.5, 5, 0.5, 3.5), (3.75, 0.5, 5, 0.5, 4.0), (0.1, 0.5, 5, 0.5, 0.5), (9, 0.5, 5, 0.5, 5.0),
     (-3.5, -10, 10, 1, -3.0), (4.9, 1, 5, 3, 4.0), (49.996, 0, 100, 0.01, 50.0), (7, 2, 2, 1, 2.0)],
)  # fmt: skip
def test_rounding_on_other_scales(value, low, high, step, expected):
    assert round_to_scale(value, low, high, step) == pytest.approx(expected, abs=1e-12)


def test_nan_is_never_hidden_by_rounding_or_clipping():
    assert math.isnan(round_to_scale(math.nan, 1, 5, 1)) and math.isnan(clip_to_scale(math.nan, 1, 5))


def test_summary_is_the_plain_formula():
    rng = np.random.default_rng(0)
    prediction, rating = rng.normal(3, 2, 500), rng.integers(1, 6, 500).astype(np.float32)
    user_cold, item_cold = rng.random(500) < 0.3, rng.random(500) < 0.2
    sums = SliceSums(1, 5, 1)
    sums.add(prediction, rating, user_cold, item_cold)
    summary = sums.summary()
    masks = {"all": np.ones(500, bool), "warm": ~user_cold & ~item_cold, "cold_user": user_cold & ~item_cold,
             "cold_item": ~user_cold & item_cold, "cold_both": user_cold & item_cold}  # fmt: skip
    assert list(summary["slices"]) == ["all", *SLICES]
    for name, mask in masks.items():
        error = prediction[mask] - rating[mask]
        found = summary["slices"][name]
        assert found["rows"] == mask.sum()
        assert found["rmse"] == pytest.approx(math.sqrt(np.mean(error**2)), rel=1e-12)
        assert found["mae"] == pytest.approx(np.mean(np.abs(error)), rel=1e-12)
    for suffix, values in (("", prediction), ("_rounded", round_to_scale(prediction, 1, 5, 1)),
                           ("_clipped", np.clip(prediction, 1, 5))):  # fmt: skip
        error = values - rating
        assert summary["headline"][f"val_rmse{suffix}"] == pytest.approx(math.sqrt(np.mean(error**2)), rel=1e-12)
        assert summary["headline"][f"val_mae{suffix}"] == pytest.approx(np.mean(np.abs(error)), rel=1e-12)


def test_no_rows_give_null_not_nan():
    summary = SliceSums(1, 5, 1).summary()
    assert summary["slices"]["all"] == {"rows": 0, "rmse": None, "mae": None}
    json.dumps(summary, allow_nan=False)


def test_float32_errors_are_summed_in_float64():
    rows = 3_000_000  # a float32 sum of this many 0.01 is off by more than 1e-3
    sums = SliceSums(1, 5, 1)
    cold = np.zeros(rows, bool)
    sums.add(np.full(rows, 3.1, np.float32), np.full(rows, 3.0, np.float32), cold, cold)
    assert sums.summary()["headline"]["val_rmse"] == pytest.approx(float(np.float32(3.1)) - 3.0, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-80, 80), st.integers(1, 5), st.booleans(), st.booleans()), max_size=30),
       st.integers(0, 30))  # fmt: skip
def test_sums_add_over_any_cut(rows, cut):
    """Eighths and whole stars are exact in float64, so every grouping gives the same bits."""
    prediction, rating, user_cold, item_cold = (np.array([row[i] for row in rows]) for i in range(4))
    whole, parts = SliceSums(1, 5, 1), [SliceSums(1, 5, 1), SliceSums(1, 5, 1)]
    whole.add(prediction / 8, rating, user_cold, item_cold)
    for part, piece in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
        part.add(prediction[piece] / 8, rating[piece], user_cold[piece], item_cold[piece])
    added = SliceSums.from_values(parts[0].values + parts[1].values, 1, 5, 1)
    assert added.values.shape == (len(SLICES), len(COLUMNS))
    assert added.summary() == whole.summary()
    assert sum(added.summary()["slices"][name]["rows"] for name in SLICES) == len(rows)


def test_the_interval_is_that_of_resampled_rows():
    """Rows in blocks by hash vary as rows do: the interval is the one that resampling rows gives."""
    rng = np.random.default_rng(3)
    rows = 20_000
    truth, own = rng.normal(0, 1, rows) ** 2, rng.normal(0, 1, rows) ** 2
    other = 0.9 * own + 0.1 * truth
    block = block_of(np.arange(rows), np.zeros(rows, np.int64), 0)
    sums = [np.bincount(block, values, BLOCKS) for values in (np.ones(rows), own, other)]
    difference, low, high = bootstrap_interval(*sums, seed=0)
    draws = rng.integers(0, rows, (2000, rows), dtype=np.int32)
    plain = np.array([math.sqrt(own[d].mean()) - math.sqrt(other[d].mean()) for d in draws])
    assert difference == pytest.approx(math.sqrt(own.mean()) - math.sqrt(other.mean()), abs=1e-12)
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.1 * np.ptp(plain) / 4)
    assert bootstrap_interval(*sums, seed=0) == (difference, low, high)
    assert bootstrap_interval(*sums, seed=1) != (difference, low, high)


def test_a_predictor_against_itself_has_an_empty_interval():
    sums = np.random.default_rng(0).random((2, BLOCKS))
    assert bootstrap_interval(sums[0], sums[1], sums[1], seed=0) == (0.0, 0.0, 0.0)
    assert all(math.isnan(value) for value in bootstrap_interval(np.zeros(BLOCKS), sums[0], sums[1], seed=0))


def test_blocks_are_even_and_depend_on_pair_and_seed():
    user, item = np.repeat(np.arange(300), 300), np.tile(np.arange(300), 300)
    block = block_of(user, item, 0)
    counts = np.bincount(block, minlength=BLOCKS)
    assert len(counts) == BLOCKS and counts.var() == pytest.approx(len(user) / BLOCKS, rel=0.2)  # Poisson
    assert (block != block_of(item, user, 0)).mean() > 0.9 and (block != block_of(user, item, 1)).mean() > 0.9

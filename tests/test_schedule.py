"""Batch order: the sorted sequence of keys, cut exactly, however it is computed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.data.batch_order import BatchOrder, lanes_of_rank
from mfdist.errors import UsageError

LARGEST = (1 << 31) - 1
LANES = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 1, 97])), min_size=1, max_size=9)


def sequence(lane_rows: list[int]) -> list[int]:
    """The lane of every row of the epoch, by sorting all keys: the definition itself."""
    keys = [(Fraction(2 * j + 1, 2 * rows), lane) for lane, rows in enumerate(lane_rows) for j in range(rows)]
    return [lane for _, lane in sorted(keys)]


@settings(max_examples=150, deadline=None)
@given(LANES, st.integers(1, 60))
def test_cuts_are_the_sorted_sequence_cut(lane_rows: list[int], batch_size: int) -> None:
    order = BatchOrder(tuple(lane_rows), batch_size)
    lanes = sequence(lane_rows)
    want = [
        [lanes[: step * batch_size].count(lane) for lane in range(len(lane_rows))]
        for step in range(order.num_steps + 1)
    ]
    assert order.cuts(0, order.num_steps).tolist() == want
    assert [order.cut(min(step * batch_size, order.num_rows)) for step in range(order.num_steps + 1)] == want
    assert sum(order.rows_of_step(step) for step in range(order.num_steps)) == order.num_rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, LARGEST) | st.integers(LARGEST - 8, LARGEST), min_size=2, max_size=70),
    st.integers(1, 1 << 40),
    st.floats(0, 1),
)
def test_fast_cuts_are_exact_up_to_billions_of_rows(lane_rows: list[int], batch_size: int, where: float) -> None:
    """Int64 products come within a hair of 2^63 here; Python integers say what is right."""
    order = BatchOrder(tuple(lane_rows), batch_size)
    step = int(where * order.num_steps)
    end = min(step + 2, order.num_steps)
    want = [order.cut(min(s * batch_size, order.num_rows)) for s in range(step, end + 1)]
    assert order.cuts(step, end).tolist() == want


def test_lanes_too_long_for_int64_products_go_through_python_integers() -> None:
    order = BatchOrder((1 << 40, (1 << 40) + 1, 3), 1 << 38)
    cuts = order.cuts(2, 4)
    assert cuts.tolist() == [order.cut(step << 38) for step in (2, 3, 4)]
    assert cuts.sum(axis=1).tolist() == [step << 38 for step in (2, 3, 4)]


def test_every_lane_gives_its_share_to_every_batch() -> None:
    order = BatchOrder((1000, 3000, 0, 4001), 80)
    slices = np.diff(order.cuts(0, order.num_steps), axis=0)[:-1]
    share = np.array(order.lane_rows) * 80 / order.num_rows
    assert np.abs(slices - share).max() <= 2
    assert (slices.sum(axis=1) == 80).all()


def test_an_empty_epoch_has_no_steps() -> None:
    order = BatchOrder((0, 0), 8)
    assert (order.num_steps, order.cut(0), order.cuts(0, 0).tolist()) == (0, [0, 0], [[0, 0]])


def test_a_batch_needs_a_row() -> None:
    with pytest.raises(UsageError, match="at least one row"):
        BatchOrder((3,), 0)


@settings(deadline=None)
@given(st.integers(0, 700), st.integers(1, 40))
def test_ranks_share_the_lanes(num_lanes: int, world_size: int) -> None:
    parts = [lanes_of_rank(num_lanes, rank, world_size) for rank in range(world_size)]
    assert [lane for part in parts for lane in part] == list(range(num_lanes))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

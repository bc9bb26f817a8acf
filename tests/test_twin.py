"""The twin of the Electronics file against the facts that are known of the real one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mfdist.synthetic.presets import ELECTRONICS
from mfdist.synthetic.synthesize import SynthesizeConfig, Truth, histogram_for, synthesize

FIRST, LAST = 912_729_600, 1_405_987_200


def make(path: Path, rows: int | None) -> tuple[pl.DataFrame, Truth]:
    truth = synthesize(SynthesizeConfig(preset="electronics", rows=rows, out=str(path)))
    return pl.read_parquet(path), truth


def degrees(frame: pl.DataFrame, side: str) -> np.ndarray:
    return np.sort(frame[side].value_counts()["count"].to_numpy().astype(np.int64))[::-1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, Truth]:
    return make(tmp_path_factory.mktemp("twin") / "twin.parquet", ELECTRONICS.rows // 100)


def test_small_twin_histogram(small: tuple[pl.DataFrame, Truth]) -> None:
    frame, _ = small
    shares = np.array(ELECTRONICS.histogram) / ELECTRONICS.rows
    counts = np.bincount(frame["rating"].to_numpy().astype(int), minlength=6)[1:]
    assert np.abs(counts - shares * frame.height).max() <= 1
    assert frame["rating"].mean() == pytest.approx(4.0123, abs=1e-4)
    assert frame["rating"].std() == pytest.approx(1.3809, abs=1e-3)


@pytest.mark.parametrize(("side", "mean", "quartiles"), [("user_id", 1.862, (1, 1, 2)), ("item_id", 16.44, (1, 2, 7))])
def test_small_twin_degrees(
    small: tuple[pl.DataFrame, Truth], side: str, mean: float, quartiles: tuple[int, ...]
) -> None:
    found = degrees(small[0], side)
    assert found.mean() == pytest.approx(mean, rel=0.002)
    assert tuple(np.quantile(found, (0.25, 0.5, 0.75))) == quartiles


def check_shape(frame: pl.DataFrame) -> None:
    """Sorted by item, ids shaped like the real ones, days within the real range, each pair once."""
    assert frame["item_id"].is_sorted()
    assert frame["user_id"].str.contains("^A[1-4][0-9A-Z]{12}$").all()
    assert frame["item_id"].str.contains("^([0-9]{10}|B00[0-9A-Z]{7})$").all()
    assert (frame["timestamp"].min(), frame["timestamp"].max()) == (FIRST, LAST)
    assert (frame["timestamp"] % 86_400 == 0).all()
    assert frame.select(pl.struct("user_id", "item_id").hash()).n_unique() == frame.height


def test_small_twin_shape(small: tuple[pl.DataFrame, Truth]) -> None:
    check_shape(small[0])
    assert small[1].repeated_pairs == 0 and small[1].synthetic


def test_histogram_is_the_real_one_at_the_real_size() -> None:
    assert tuple(histogram_for(ELECTRONICS, ELECTRONICS.rows)) == (901_765, 456_322, 633_073, 1_485_781, 4_347_541)


@pytest.mark.slow
def test_full_twin(tmp_path: Path) -> None:
    synthesize(SynthesizeConfig(preset="electronics", rows=1000, out=str(tmp_path / "warm.parquet")))
    start = time.process_time()
    truth = synthesize(SynthesizeConfig(preset="electronics", out=str(tmp_path / "twin.parquet")))
    assert truth.rows / (time.process_time() - start) > 1e6  # a second of one core, whatever else the machine does
    frame = pl.read_parquet(tmp_path / "twin.parquet")
    assert (truth.rows, truth.num_users, truth.num_items) == (7_824_482, 4_201_696, 476_002)
    counts = np.bincount(frame["rating"].to_numpy().astype(int))
    assert counts.tolist() == [0, 901_765, 456_322, 633_073, 1_485_781, 4_347_541]
    users, items = degrees(frame, "user_id"), degrees(frame, "item_id")
    assert (len(users), len(items)) == (4_201_696, 476_002)
    assert users[:10].tolist() == [520, 501, 498, 431, 406, 380, 314, 311, 308, 296]
    assert items[:10].tolist() == [18244, 16454, 14172, 12285, 12226, 11617, 10276, 9907, 9823, 9487]
    assert users.std() == pytest.approx(2.89, rel=0.02) and items.std() == pytest.approx(112.7, rel=0.02)
    assert tuple(np.quantile(users, (0.25, 0.5, 0.75))) == (1, 1, 2)
    assert tuple(np.quantile(items, (0.25, 0.5, 0.75))) == (1, 2, 7)
    heavy = frame["user_id"].value_counts().filter(pl.col("count") >= 50)
    rows = frame.join(heavy, on="user_id", how="semi")
    assert heavy.height == pytest.approx(1540, rel=0.02) and rows.height == pytest.approx(125_871, rel=0.02)
    assert rows["item_id"].n_unique() == pytest.approx(48_190, rel=0.02)
    check_shape(frame)

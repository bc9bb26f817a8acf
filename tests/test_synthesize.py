"""Planted ratings: a pure function of the seed, exact sums, a noise floor that holds, files that read back."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfdist.config import parse_config
from mfdist.errors import UsageError
from mfdist.synthetic import planted, presets, synthesize
from mfdist.synthetic.degrees import degree_classes
from mfdist.synthetic.planted import Planted
from mfdist.synthetic.synthesize import SynthesizeConfig, histogram_for, read_truth

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
import synthesize as job  # jobs are programs, not a package

NAMES = ["user_id", "item_id", "rating", "timestamp"]


def make(path: Path, **flags: object) -> tuple[pl.DataFrame, synthesize.Truth]:
    truth = synthesize.synthesize(SynthesizeConfig(out=str(path), **flags))  # type: ignore[arg-type]
    if path.suffix == ".parquet":
        return pl.read_parquet(path), truth
    types = dict(zip(NAMES, (pl.String, pl.String, pl.Float32, pl.Int64), strict=True))
    return pl.read_csv(path, has_header=False, new_columns=NAMES, schema_overrides=list(types.values())), truth


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, synthesize.Truth]:
    return make(tmp_path_factory.mktemp("builtin") / "builtin.csv")


def test_builtin_counts_are_exact(builtin: tuple[pl.DataFrame, synthesize.Truth]) -> None:
    frame, truth = builtin
    assert frame.height == truth.rows == 200_000
    assert frame["user_id"].n_unique() == truth.num_users == 3_000
    assert frame["item_id"].n_unique() == truth.num_items == 1_000
    counts = dict(frame["rating"].value_counts().iter_rows())
    assert [(float(k), counts[k]) for k in sorted(counts)] == truth.rating_histogram
    assert frame["rating"].cast(pl.Float64).mean() == pytest.approx(truth.global_mean)


def test_rows_are_sorted_by_item_and_pairs_are_unique(builtin: tuple[pl.DataFrame, synthesize.Truth]) -> None:
    frame, truth = builtin
    assert frame["item_id"].is_sorted()
    assert truth.repeated_pairs == 0
    assert frame.select("user_id", "item_id").n_unique() == frame.height


def test_users_and_items_are_skewed(builtin: tuple[pl.DataFrame, synthesize.Truth]) -> None:
    for side in ("user_id", "item_id"):
        counts = builtin[0][side].value_counts()["count"]
        assert counts.max() > 5 * counts.mean() > 5 * counts.median()  # type: ignore[operator]


def test_same_seed_same_bytes_whatever_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for number, cores in enumerate((1, 7)):
        monkeypatch.setattr(synthesize.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(synthesize, "PIECE_ROWS", 1000)
        make(tmp_path / f"{number}.csv", rows=20_000)
        contents.append([(tmp_path / f"{number}.csv{end}").read_bytes() for end in ("", ".truth.json")])
    assert contents[0] == contents[1]
    make(tmp_path / "2.csv", rows=20_000, seed=43)
    assert (tmp_path / "2.csv").read_bytes() != contents[0][0]


def test_every_format_holds_the_same_rows(tmp_path: Path) -> None:
    frame, _ = make(tmp_path / "a.csv", rows=5_000)
    parquet, _ = make(tmp_path / "a.parquet", rows=5_000)
    assert parquet.equals(frame)
    make(tmp_path / "a.csv.gz", rows=5_000)
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()) == (tmp_path / "a.csv").read_bytes()


def test_noise_floor_is_what_the_truth_reaches() -> None:
    """A predictor that knows score and thresholds has the stated errors on the drawn stars; a blunted one has more."""
    preset = presets.BUILTIN
    classes = [degree_classes(curve, curve.num_ids_for(100_000), 100_000) for curve in (preset.users, preset.items)]
    source = Planted(*classes, preset.effects, seed=3)
    rows = [source.rows(piece) for piece in source.pieces(1 << 15)]
    thresholds = np.array([-3.0, -1.5, 0.0, 2.0])
    score = np.concatenate([part.score for part in rows])
    drawn = [planted.ratings_of(part, thresholds) for part in rows]
    stars = np.concatenate([part[0] for part in drawn]).astype(float)
    above = 1 / (1 + np.exp(thresholds[:, None] - score))
    best, median = 1 + above.sum(axis=0), 1 + (above > 0.5).sum(axis=0)
    floor_rmse = np.sqrt(sum(part[1] for part in drawn) / len(stars))
    floor_mae = sum(part[2] for part in drawn) / len(stars)
    assert np.sqrt(np.mean((stars - best) ** 2)) == pytest.approx(floor_rmse, abs=0.005)
    assert np.mean(np.abs(stars - median)) == pytest.approx(floor_mae, abs=0.005)
    assert np.sqrt(np.mean((stars - best.mean()) ** 2)) > floor_rmse + 0.1


def test_planted_structure_is_low_rank() -> None:
    """Scores without the biases have exactly ``rank`` factors."""
    item, user = np.divmod(np.arange(200 * 200), 200)
    score, noisy = planted._scores(user, item, 0, (0.0, 0.0, 1 / np.sqrt(2)), 2, np.uint64(1))
    sizes = np.linalg.svd(score.reshape(200, 200), compute_uv=False)
    assert sizes[1] > 1 and sizes[2] < 1e-9
    assert score.std() == pytest.approx(1.0, abs=0.2)
    assert (noisy - score).std() == pytest.approx(np.pi / np.sqrt(3), rel=0.02)  # the logistic distribution's
    biased, _ = planted._scores(user, item, 0, (0.5, 0.0, 0.0), 2, np.uint64(1))
    assert biased.reshape(200, 200).std(axis=1).mean() == pytest.approx(0.5, abs=0.1)
    assert np.ptp(biased.reshape(200, 200), axis=0).max() < 1e-12


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5000), ids=st.floats(0, 1), name=st.sampled_from(sorted(presets.PRESETS)), side=st.booleans()
)
def test_degrees_sum_exactly(rows: int, ids: float, name: str, side: bool) -> None:
    preset = presets.PRESETS[name]
    count = max(1, round(rows * ids))
    classes = degree_classes(preset.users if side else preset.items, count, rows)
    assert classes.counts.sum() == count and classes.counts @ classes.degrees == rows
    assert (classes.counts > 0).all() and (classes.degrees >= 1).all() and (np.diff(classes.degrees) < 0).all()


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_places_are_a_bijection(count: int, key: int) -> None:
    found = [planted._place(number, count, np.uint64(key)) for number in range(count)]
    assert sorted(found) == list(range(count))


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 400), seed=st.integers(0, 2**63 - 1), name=st.sampled_from(sorted(presets.PRESETS)))
def test_any_size_can_be_made(tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / "a.parquet"
    frame, truth = make(path, rows=rows, seed=seed, preset=name)
    assert frame.height == rows == sum(count for _, count in truth.rating_histogram)
    assert [count for _, count in truth.rating_histogram] == histogram_for(presets.PRESETS[name], rows).tolist()


def test_given_users_and_items(tmp_path: Path) -> None:
    frame, truth = make(tmp_path / "a.csv", rows=30_000, users=9_000, items=700, preset="electronics")
    assert frame["user_id"].n_unique() == truth.num_users == 9_000
    assert frame["item_id"].n_unique() == truth.num_items == 700


def test_truth_beside_the_file_says_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "r.csv")
    assert job.main(["--rows", "3000", "--seed", "5", "--out", out]) == 0
    assert "3,000 synthetic ratings" in capsys.readouterr().out
    truth = json.loads((tmp_path / "r.csv.truth.json").read_text())
    assert truth["synthetic"] is True and truth["seed"] == 5 and truth["noise_floor"]["rmse"] > 0
    assert read_truth(out).rows == 3000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "a.tsv"], "must end in"),
        (["--rows", "100", "--users", "101"], "at least one rating"),
        (["--rows", "100", "--users", "5", "--items", "10"], "times --items"),
        (["--preset", "books"], "expected one of"),
        (["--rows", "0"], "at least 1"),
        (["--row", "7"], "Did you mean '--rows'"),
    ],
)
def test_wrong_usage(flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        synthesize.synthesize(parse_config(SynthesizeConfig, flags, ""))
    assert list(tmp_path.iterdir()) == []

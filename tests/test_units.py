"""Ratings on any scale: the same predictions after the same map; offset, export and mirrored scales."""

import json

import numpy as np
import pytest
from datasets import write_dataset

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.log import Console
from mfdist.model.units import Units
from mfdist.prepare.write_pass import rating_moments
from mfdist.results.exported_model import ExportedModel
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(False)
MAPS = {
    "times ten": lambda r: 10 * r,
    "plus a hundred": lambda r: r + 100,
    "mirrored": lambda r: 6 - r,
    "half stars": lambda r: r / 2,
    "one to ten": lambda r: 1 + (r - 1) * 9 / 4,
    "minus ten to ten": lambda r: -10 + (r - 1) * 5,
    "zero to one": lambda r: (r - 1) / 4,
    "millionths": lambda r: 1e-6 * r,
}
CASES = {
    "recipe": {"emb_dim": 16, "epochs": 4},
    "quick": {},
    "svd": {"emb_dim": 8, "epochs": 2},
    "a sigmoid": {"no_sigmoid": False, "emb_dim": 8, "epochs": 2},
    "adamw": {"optimizer": "adamw", "lr": 0.02, "batch_size": 64, "emb_dim": 16, "epochs": 4},
}


def columns(transform, seed=3):
    """Two lanes of 40 users each on 30 items; most ratings are high."""
    rng = np.random.default_rng(seed)
    p, q = rng.normal(0, 0.7, (80, 3)), rng.normal(0, 0.7, (30, 3))
    lanes = {"train": [], "val": []}
    for first, end in RANGES:
        for split, rows in (("train", 600), ("val", 150)):
            user, item = rng.integers(first, end, rows), rng.integers(0, 30, rows)
            rating = np.clip(np.rint(4.2 + (p[user] * q[item]).sum(1) + rng.normal(0, 0.7, rows)), 1, 5)
            lanes[split].append([
                {"user": user.astype("i4"), "item": item.astype("i4"), "rating": transform(rating).astype("f4")}
            ])  # fmt: skip
    return lanes


RANGES = [(0, 40), (40, 80)]


def made(path, transform=lambda r: r):
    lanes = columns(transform)
    write_dataset(path, lanes["train"], lanes["val"], ranges=RANGES, num_items=30)
    return str(path)


def flags(case, data, run):
    values = dict(CASES[case], data=data, run_dir=str(run), device="cpu")
    return TrainConfig.ready(case, **values) if case in ("quick", "svd") else TrainConfig(**values)


def predictions(case, data, run):
    """Of all pairs, by the export; and the report."""
    report = train(flags(case, data, run), World.alone(), QUIET)
    user, item = (grid.ravel() for grid in np.meshgrid(np.arange(80), np.arange(30), indexing="ij"))
    return ExportedModel.open(str(run)).predict(user, item), report


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Each configuration on stars."""
    folder = tmp_path_factory.mktemp("stars")
    data = made(folder / "data")
    return {case: predictions(case, data, folder / case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_the_ratings_is_the_same_map_of_the_predictions(name, case, plain, tmp_path):
    if case in ("svd", "adamw") and name not in ("times ten", "mirrored", "millionths"):
        pytest.skip("the maps that differ most are enough here")
    expected, before = plain[case]
    found, report = predictions(case, made(tmp_path / "data", MAPS[name]), tmp_path / "run")
    spread = np.ptp(MAPS[name](expected))
    assert spread > 0.3 * np.ptp(MAPS[name](np.array([1.0, 5.0]))), "predictions differ from each other"
    np.testing.assert_allclose(found, MAPS[name](expected), rtol=0, atol=2e-4 * spread)
    step = abs(MAPS[name](np.array(2.0)) - MAPS[name](np.array(1.0)))
    for key in ("train_rmse", "val_rmse"):
        assert report["epochs"][-1][key] == pytest.approx(before["epochs"][-1][key] * step, rel=1e-3)
    assert report["final"]["val_rmse_clipped"] == pytest.approx(before["final"]["val_rmse_clipped"] * step, rel=1e-3)


def test_ratings_as_given_are_not_scale_free(plain, tmp_path):
    """What the units are for: without them the same flags on ten times the ratings are another run."""
    found = []
    for number, transform in enumerate((lambda r: r, lambda r: 10 * r)):
        data = made(tmp_path / f"data-{number}", transform)
        c = TrainConfig(data=data, run_dir=str(tmp_path / f"run-{number}"), device="cpu", emb_dim=16, epochs=4,
                        rating_units="given", offset="mean", lr=0.02)  # fmt: skip
        found.append(train(c, World.alone(), QUIET)["final"]["val_rmse_clipped"])
    assert abs(found[1] - 10 * found[0]) > 0.1


def test_the_offset_begins_at_the_mean_and_is_learned(plain, tmp_path):
    data = made(tmp_path / "data")
    mean = Dataset.open(data).manifest.global_mean
    offsets = []
    for lr in (1e-9, 0.0215):
        c = TrainConfig(data=data, run_dir=str(tmp_path / str(lr)), device="cpu", emb_dim=16, epochs=4, lr=lr)
        train(c, World.alone(), QUIET)
        offsets.append(ExportedModel.open(c.run_dir).offset)
    assert offsets[0] == pytest.approx(mean, abs=1e-6)
    assert 2e-6 < abs(offsets[1] - mean) < 0.5


def test_units():
    for spread, skewness, sign in ((2.0, -0.5, 1), (2.0, 0.0, 1), (2.0, 0.5, -1)):
        assert Units.of_ratings(3.0, spread, skewness, centred=True) == Units(3.0, sign * spread)
    assert Units.of_ratings(3.0, 4.0, 1.0, centred=False) == Units(0.0, 5.0)
    assert Units.of_ratings(3.0, 0.0, 0.0, centred=True) == Units(3.0, 1.0)  # all ratings are the same
    assert Units(3.5, -2.0).span(0.5, 5.5) == (-1.0, 1.5)


def test_moments_of_ratings():
    found = rating_moments({1.0: 1, 3.0: 2, 7.0: 1})
    values = np.array([1.0, 3, 3, 7])
    assert found["global_mean"] == values.mean() and found["rating_spread"] == pytest.approx(values.std())
    assert found["rating_skewness"] == pytest.approx((((values - values.mean()) / values.std()) ** 3).mean())
    assert rating_moments({}) == {"global_mean": 0.0, "rating_spread": 0.0, "rating_skewness": 0.0}
    assert rating_moments({4.0: 9})["rating_spread"] == 0


def test_equal_ratings_are_predicted(tmp_path):
    found, report = predictions("recipe", made(tmp_path / "data", lambda r: 0 * r + 4), tmp_path / "run")
    assert np.abs(found - 4).max() < 0.3 and report["final"]["val_rmse"] < 0.1


def test_a_dataset_that_says_its_spread_gives_the_same_run(plain, tmp_path):
    """One that an earlier version prepared does not, and is read once for it."""
    data = made(tmp_path / "data")
    path = tmp_path / "data" / "dataset.json"
    about = json.loads(path.read_text())
    assert about["rating_spread"] is None
    rating = np.concatenate([part["rating"] for lane in columns(lambda r: r)["train"] for part in lane]).astype("f8")
    values, counts = np.unique(rating, return_counts=True)
    about |= rating_moments(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    path.write_text(json.dumps(about))
    found, _ = predictions("recipe", data, tmp_path / "run")
    np.testing.assert_allclose(found, plain["recipe"][0], rtol=0, atol=1e-5)

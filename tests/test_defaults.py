"""What training does without flags and with one: every switch trains alone, the recipe gives way where it must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import make_dataset, write_dataset
from test_train import QUIET, curve, exported

from mfdist.cluster.world import World
from mfdist.config import parse_config, read_toml
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.training.config import TrainConfig
from mfdist.training.data_facts import batch_size, even_batch_size, fitted, implicit
from mfdist.training.defaults import members_of
from mfdist.training.train import train

SMALL = ["--epochs", "1", "--device", "cpu"]
FLAGS = [
    [], ["--model", "mf"], ["--no-bias"], ["--no-init"], ["--no-sigmoid"], ["--sigmoid-range", "0,6"],
    ["--emb-dim", "1"], ["--emb-dim", "10"], ["--optimizer", "adamw"], ["--optimizer", "sparse_adam"],
    ["--optimizer", "rowwise_adagrad"], ["--weight-decay", "0.01"], ["--sharding", "replicated"], ["--cold", "own"],
    ["--reduction", "mean"], ["--offset", "mean"], ["--rating-units", "given"],
    ["--model", "mf", "--optimizer", "adamw"],
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=600, lanes=4, val_rows=100, users=60, items=30, row_group=64)
    return path


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_each_flag_alone_trains(data: str, tmp_path: object, flags: list[str]) -> None:
    argv = ["--data", data, "--run-dir", str(tmp_path), *SMALL, *flags]
    report = train(parse_config(TrainConfig, argv, ""), World.alone(), QUIET)
    assert report is not None and np.isfinite(report["final"]["val_rmse"])


@pytest.mark.parametrize("flags", [["--reduction", "mean"], ["--optimizer", "rowwise_adagrad"]], ids=" ".join)
def test_rates_stand_a_short_last_batch(data: str, tmp_path: object, flags: list[str]) -> None:
    """600 ratings in batches of 500: in the last one the mean is over a hundred, at full rate."""
    argv = ["--data", data, "--run-dir", str(tmp_path), *SMALL, "--epochs", "8", "--batch-size", "500", *flags]
    report = train(parse_config(TrainConfig, argv, ""), World.alone(), QUIET)
    assert report is not None and curve(report)[-1, 0] < curve(report)[0, 0]


@pytest.mark.parametrize("batch_size, warned", [(599, True), (300, False), (0, False)])
def test_a_last_batch_of_one_rating(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int, warned: bool
) -> None:
    """Its mean is that rating's own error, as plain torch has it; so it is said, and does not come about by itself."""
    given = {"batch_size": batch_size} if batch_size else {}
    config = TrainConfig(
        data=data, run_dir=str(tmp_path), device="cpu", epochs=1, emb_dim=16, reduction="mean", **given
    )
    train(config, World.alone(), Console(True))
    assert ("the weight of 599 elsewhere" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("ratings, size", [(1, 1), (600, 600), (1025, 513), (2048, 1024), (100_001, 1021)])
def test_batches_of_a_mean_are_even(ratings: int, size: int) -> None:
    assert even_batch_size(ratings) == size and (ratings - 1) % size + 1 > size // 2


def test_no_flags_are_the_recipe() -> None:
    ours = TrainConfig()
    assert ours == TrainConfig.ready("recipe")
    assert ours.model == "mf_advanced" and ours.offset == "learned"


@pytest.mark.parametrize("name", ["vignette_mf", "vignette_mf_advanced"])
def test_the_vignettes_settings_are_whole(name: str) -> None:
    """Nothing of the recipe's may be left in them: each flag of it is given in the file."""
    given = read_toml(TrainConfig, name)
    recipe = set(read_toml(TrainConfig, "recipe"))
    assert recipe - set(given) == set()
    config = TrainConfig.ready(name)
    assert (config.optimizer, config.reduction, config.members, config.implicit) == ("adamw", "mean", 0, 0.0)
    assert not any(config.row_l2) and not any(config.l2) and config.cold == "own" and config.rating_units == "given"


@pytest.mark.parametrize(("dim", "members"), [(1, 0), (2, 0), (3, 1), (16, 1), (32, 2), (50, 2), (128, 8), (100, 5)])
def test_members_of_about_sixteen_factors(dim: int, members: int) -> None:
    found = members_of(dim)
    assert found == members and (not found or dim % found == 0)


def test_what_the_data_decides(data: str) -> None:
    """By hand from the counts; a flag that is given stays."""
    dataset = Dataset.open(data)
    counts = [dataset.counts("users", 0, 60).astype(float), dataset.counts("items").astype(float)]
    config, _ = fitted(TrainConfig(), dataset, World.alone())

    def left_open(side: int, own: float, square: float) -> float:
        return float((counts[side] / (own + square * counts[side])).sum() / 600)

    user_factors, item_factors = left_open(0, 5.4, 0.06), left_open(1, 4.0, 0.06)
    user_biases, item_biases = left_open(0, 5.0, 0.3), left_open(1, 6.5, 0.3)
    assert config.l2 == pytest.approx(
        [0.42 * item_factors, 0.42 * user_factors, 0, 0, 0.8 * item_biases, 0.8 * user_biases], rel=1e-3
    )
    share = float((counts[0] ** 2).sum()) / 600 / 30
    assert config.implicit == pytest.approx(0.25 * max(0, 1 - 4 * share**2), rel=1e-3)
    given = TrainConfig(l2=(0.02, 0.01), implicit=0.4, batch_size=7)
    assert given.l2 == (0.02, 0.02, 0.01, 0.01, 0.01, 0.01)
    assert fitted(given, dataset, World.alone())[0] == given
    assert TrainConfig(implicit=0.0).implicit == 0


def test_batches_are_small_where_a_row_has_many_ratings() -> None:
    rate = TrainConfig(data="d").lr
    assert [batch_size(most, 1000, rate) for most in (10, 16, 1000)] == [1024, 512, 16]
    assert batch_size(10, 1000, 8 * rate) == 128 and batch_size(10, 1000, rate / 8) == 1024


def test_bags_weigh_less_where_users_rate_most_items() -> None:
    assert (implicit(0.0), implicit(0.25), implicit(0.9)) == (0.25, 0.1875, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("users, items", [(20, 3000), (4000, 12)])
def test_the_recipe_where_one_side_has_few_rows(users: int, items: int, tmp_path: Path) -> None:
    """Thousands of rows of a few ratings against a dozen of thousands: factors without a rule for it are noise, and
    the error was 2 and 3% above that of biases alone."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(users * items)[:20_000]
    user, item = (part.astype("i4") for part in np.divmod(pairs, items))
    p, q = rng.normal(size=(users, 4)), rng.normal(size=(items, 4))
    score = 0.4 * rng.normal(size=users)[user] + 0.5 * rng.normal(size=items)[item] + 0.2 * (p[user] * q[item]).sum(1)
    rating = np.clip(np.rint(3 + score + 0.9 * rng.normal(size=len(score))), 1, 5).astype("f4")
    ranges = [(users * k // 2, users * (k + 1) // 2) for k in range(2)]
    lanes: dict[str, list[list[dict[str, np.ndarray]]]] = {"train": [], "val": []}
    for first, end in ranges:
        mine = np.flatnonzero((user >= first) & (user < end))
        for split, rows in (("train", mine[mine % 5 > 0]), ("val", mine[mine % 5 == 0])):
            lanes[split].append([{"user": user[rows], "item": item[rows], "rating": rating[rows]}])
    write_dataset(tmp_path / "data", lanes["train"], lanes["val"], ranges=ranges, num_items=items)
    config = TrainConfig(data=str(tmp_path / "data"), run_dir=str(tmp_path / "run"), device="cpu", emb_dim=32)
    report = train(config, World.alone(), QUIET)
    assert report is not None
    assert report["final"]["val_rmse_clipped"] < 1.003 * report["floors"]["bias"]["rmse"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_is_lengthened(data: str, tmp_path: object, schedule: str) -> None:
    values = {"data": data, "run_dir": str(tmp_path), "device": "cpu", "emb_dim": 16, "lr_schedule": schedule}
    before = train(TrainConfig(**values, epochs=2), World.alone(), QUIET)
    after = train(TrainConfig(**values, epochs=4), World.alone(), QUIET)
    assert before is not None and after is not None
    assert np.array_equal(curve(after)[:2], curve(before)) and len(after["epochs"]) == 4
    if schedule == "constant":
        whole = train(TrainConfig(**{**values, "run_dir": f"{tmp_path}/whole"}, epochs=4), World.alone(), QUIET)
        assert np.array_equal(curve(after), curve(whole))
        for name, tensor in exported(f"{tmp_path}/whole").items():
            np.testing.assert_array_equal(exported(str(tmp_path))[name], tensor)
    with pytest.raises(UsageError, match="begun with another"):
        train(TrainConfig(**values, epochs=4, seed=9), World.alone(), QUIET)

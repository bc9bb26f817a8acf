"""The search for settings: it sees training rows alone, goes on where it was, and leaves what train takes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import browser
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import make_dataset

from mfdist.cluster.world import World
from mfdist.config import read_toml
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.errors import DataError, DivergedError, StopRequested, UsageError
from mfdist.log import Console
from mfdist.run.lease import LeaseLost
from mfdist.training.config import TrainConfig
from mfdist.training.data_facts import fitted
from mfdist.tuning import search
from mfdist.tuning.config import TuneConfig
from mfdist.tuning.inner_splits import DROPPED, HELD, TRAIN, inner_splits, rules_of
from mfdist.tuning.search import tune
from mfdist.tuning.space import MULTIPLES, Parameter, parse_search, settings_of, space_of, start_of

SMALL = "emb-dim = 16\nepochs = 2\nbatch-size = 500\nimplicit = 0.0\n"
"""Of a training that takes no time."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tune") / "data")
    make_dataset(path, rows=4000, lanes=4, val_rows=800, users=200, items=50, timestamp=True)
    return path


def config(data, run, **flags):
    (file := Path(run).parent / "small.toml").write_text(SMALL)
    given = {"data": str(data), "run_dir": str(run), "training": str(file), "trials": 4, "splits": 2, "device": "cpu",
             "search": ("lr=0.005:0.05", "row-l2=x0.3:x3", "emb-dim=8,16")}  # fmt: skip
    return TuneConfig(**{**given, **flags})


def tuned(data, run, **flags):
    """The search's tune.json, without what is of the clock."""
    tune(config(data, run, **flags), World.alone(), Console(False))
    return without_times(run)


def without_times(run):
    found = json.loads((Path(run) / "tune.json").read_text())
    return {**found, "trials": [{**trial, "seconds": 0} for trial in found["trials"]]}


def steady(error, seen=None):
    """In the place of a training: one whose error is ``error(config)`` from its first tenth on."""

    def course(config, dataset, world, advance):
        for done in range(1, 11):
            advance(100)
            if seen is not None:
                seen.append((config, dataset.path, done))
            yield done, error(config)

    return course


def test_no_validation_row_is_read(data, tmp_path):
    """Without the files of the validation rows, and with other ones in their place, everything is the same."""
    found = tuned(data, tmp_path / "a")
    without = shutil.copytree(data, tmp_path / "without")
    shutil.rmtree(without / "val")
    assert tuned(without, tmp_path / "b") == found
    for file in (other := shutil.copytree(data, tmp_path / "other")).glob("val/*.parquet"):
        table = pq.read_table(file)
        ones = pa.array(np.ones(len(table), np.float32))
        pq.write_table(table.set_column(2, table.schema.field("rating"), ones), file)
    assert tuned(other, tmp_path / "c") == found
    assert found["trials"][0]["of_splits"] and found["best"] is not None
    splits = [sorted((tmp_path / run / "splits").rglob("*.parquet")) for run in "abc"]
    assert len(splits[0]) > 10
    for files in zip(*splits, strict=True):
        assert len({file.read_bytes() for file in files}) == 1, files


def test_the_best_is_taken_by_train(data, tmp_path):
    found = tuned(data, tmp_path / "run")
    given = read_toml(TrainConfig, str(tmp_path / "run/best.toml"))
    best = found["trials"][found["best"] - 1]["values"]
    settled = TrainConfig(**given)
    assert settled.lr == best["lr"] and settled.emb_dim == int(best["emb-dim"]) and settled.epochs == 2
    plain = TrainConfig(**{name: value for name, value in given.items() if name != "row_l2"})
    assert settled.row_l2 == pytest.approx([best["row-l2 x"] * part for part in plain.row_l2], rel=1e-3)
    assert min(t["figure"] for t in found["trials"] if t["figure"]) == found["trials"][found["best"] - 1]["figure"]


class Killed(BaseException):
    pass


def test_killed_again_and_again_it_finds_what_it_would_have_found(data, tmp_path, monkeypatch):
    """Killed at every point in turn; a line is cut off once; no finished split is trained twice."""
    trained: list[str] = []

    def noisy(config):
        return 1 + config.lr + np.random.default_rng(round(1e6 * config.lr)).normal(0, 0.01)

    monkeypatch.setattr(search, "course", steady(noisy))
    undisturbed = tuned(data, tmp_path / "a", trials=14)
    assert any(trial["ended_early"] for trial in undisturbed["trials"])

    for point in range(1, 40):
        left = [point]

        def fragile(config, dataset, world, advance, left=left):
            for done in range(1, 11):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                yield done, noisy(config)
            trained.append(f"{config.lr} {config.row_l2} {config.emb_dim} {dataset.path}")

        monkeypatch.setattr(search, "course", fragile)
        try:
            assert tuned(data, tmp_path / "b", trials=14) == undisturbed
            break
        except Killed:
            with open(tmp_path / "b/trials.jsonl", "a") as stream:
                stream.write('{"op_code": 5, "wor')
    else:
        raise AssertionError("it never came to its end")
    assert len(trained) == len(set(trained)) > 14


def test_a_stop_ends_with_75_and_the_same_command_goes_on(data, tmp_path):
    """While the inner splits are made, and before the first trial."""
    run = tmp_path / "run"
    run.mkdir()
    for made, said in ((False, "STOP; run the same command again"), (True, "STOP; 0 of 4 trials are kept, run the")):
        if made:
            inner_splits(Dataset.open(data), str(run / "splits"), 2, 42, Console(False))
        (run / "STOP").touch()
        with pytest.raises(StopRequested, match=f"found the file {said}"):
            tuned(data, run)
        assert not (run / "STOP").exists()
    assert tuned(data, tmp_path / "run") == tuned(data, tmp_path / "other")


def test_minutes_end_a_call_with_what_there_is(data, tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(search, "course", steady(lambda config: clock.__setitem__(0, clock[0] + 2) or config.lr))
    monkeypatch.setattr("mfdist.tuning.search.time.monotonic", lambda: clock[0])
    tune(config(data, tmp_path / "run", minutes=1.5), World.alone(), Console())
    said = capsys.readouterr().out
    assert "--minutes 1.5 are over; 2 of 4 trials are kept" in said and "best:" in said
    assert len(without_times(tmp_path / "run")["trials"]) == 2


def test_poor_trials_end_early_and_the_first_changes_nothing(data, tmp_path, monkeypatch):
    seen: list = []
    monkeypatch.setattr(search, "course", steady(lambda config: 1 + abs(math.log(config.lr / 0.02)), seen))
    found = tuned(data, tmp_path / "run", trials=30, search=("lr=0.0001:1",))
    assert found["start"] == 1 and found["trials"][0]["values"] == {"lr": TrainConfig().lr}
    early = [trial for trial in found["trials"] if trial["ended_early"]]
    assert 5 < len(early) < 26 and len(seen) < 30 * 2 * 10 - 7 * 17
    assert all("worse there than half" in trial["ended_early"] and trial["figure"] is None for trial in early)
    assert found["trials"][found["best"] - 1]["figure"] < 1.3
    page = (tmp_path / "run/tune.html").read_text()
    assert "Best so far" in page and "mfdist train --data" in page and "ended early" in page


def test_a_loss_that_is_no_number_ends_a_trial(data, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "course", steady(lambda config: math.nan if config.lr > 0.01 else 1.0))
    found = tuned(data, tmp_path / "run", trials=8, search=("lr=0.001:0.1",))
    assert {trial["ended_early"] for trial in found["trials"]} == {None, "the loss became NaN or infinite"}
    with pytest.raises(DivergedError, match="every trial"):
        tuned(data, tmp_path / "other", trials=3, search=("lr=0.02:0.1",))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "--seed"), ({"splits": 3}, "--splits"), ({"search": ("lr",)}, "--search")],
)
def test_another_search_does_not_go_on_with_this_one(data, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(search, "course", steady(lambda config: config.lr))
    tuned(data, tmp_path / "run", trials=2)
    with pytest.raises(UsageError, match=f"holds a search of other {said}; choose another --run-dir, or --overwrite"):
        tuned(data, tmp_path / "run", **change)
    assert len(tuned(data, tmp_path / "run", trials=3)["trials"]) == 3
    assert len(tuned(data, tmp_path / "run", trials=2, overwrite=True, **change)["trials"]) == 2


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no search"):
            tuned(data, tmp_path / "run", overwrite=overwrite)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    (tmp_path / "mine/splits").mkdir(parents=True)
    (tmp_path / "mine/splits/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and holds no search"):
        tuned(data, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/splits/thesis.txt").exists()


def test_a_damaged_log_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "course", steady(lambda config: config.lr))
    tuned(data, tmp_path / "run", trials=2)
    log = tmp_path / "run/trials.jsonl"
    log.write_text("no json\n" + log.read_text())
    with pytest.raises(DataError, match=r"trials.jsonl, line 1, is damaged; --overwrite"):
        tuned(data, tmp_path / "run", trials=3)


def test_damaged_facts_of_the_search_are_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "course", steady(lambda config: config.lr))
    tuned(data, tmp_path / "run", trials=2)
    for text in ("[]", '{"data": "'):
        (tmp_path / "run/search.json").write_text(text)
        with pytest.raises(DataError, match=r"search.json is damaged .*; --overwrite begins the search anew"):
            tuned(data, tmp_path / "run", trials=3)
    assert len(tuned(data, tmp_path / "run", trials=2, overwrite=True)["trials"]) == 2


def test_who_has_lost_the_directory_adds_nothing(data, tmp_path, monkeypatch):
    def lost(config):
        holder = json.loads((tmp_path / "run/lease.json").read_text())
        (tmp_path / "run/lease.json").write_text(json.dumps({**holder, "token": "another", "nonce": "another"}))
        return config.lr

    monkeypatch.setattr(search, "course", steady(lost))
    with pytest.raises(LeaseLost, match="was taken over"):
        tuned(data, tmp_path / "run")
    assert not (tmp_path / "run/tune.json").exists()


def test_a_signal_ends_the_making_of_inner_splits(data, tmp_path):
    rounds = []

    def look():
        rounds.append(1)
        if len(rounds) == 2:
            raise StopRequested("now")

    with pytest.raises(StopRequested):
        inner_splits(Dataset.open(data), str(tmp_path), 3, 0, Console(False), look)
    assert len(rounds) == 2 and not list(tmp_path.rglob("dataset.json"))


def test_what_a_device_cannot_hold_ends_a_trial(data, tmp_path, monkeypatch):
    def full(config):
        if config.emb_dim > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return config.lr

    monkeypatch.setattr(search, "course", steady(full))
    found = tuned(data, tmp_path / "run", trials=6, search=("emb-dim=8,16,32",))
    assert {trial["ended_early"] for trial in found["trials"]} == {None, "the device has too little memory for it"}


def test_a_machine_without_room_ends_the_search_and_no_trial(data, tmp_path, monkeypatch):
    def no_room(*_):
        raise UsageError("the tables take 9 GiB, and 1 GiB are free here")

    monkeypatch.setattr(search, "course", steady(no_room))
    monkeypatch.setattr(search, "check_memory", no_room)
    with pytest.raises(UsageError, match="1 GiB are free"):
        tuned(data, tmp_path / "run", trials=3)
    monkeypatch.setattr(search, "course", steady(lambda config: config.lr))
    found = tuned(data, tmp_path / "run", trials=3)
    assert [trial["ended_early"] for trial in found["trials"]] == [None] * 3


def test_other_programs_on_a_device_end_the_search_and_no_trial(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 85)
    search._refuse_full_device(torch.device("cuda"))  # our own
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    with pytest.raises(UsageError, match="other programs hold"):
        search._refuse_full_device(torch.device("cuda"))


def test_a_split_that_is_half_removed_is_made_anew(data, tmp_path):
    dataset = Dataset.open(data)
    made = inner_splits(dataset, str(tmp_path), 1, 0, Console(False))[0]
    lost = next((tmp_path / "1/train").iterdir())
    lost.unlink()
    again = inner_splits(dataset, str(tmp_path), 1, 0, Console(False))[0]
    assert lost.exists() and again.manifest == made.manifest


def test_settings_that_were_tried_are_not_trained_again(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(search, "course", steady(lambda config: config.emb_dim, seen))
    found = tuned(data, tmp_path / "run", trials=7, search=("emb-dim=8,16",))
    trained = {(config.emb_dim, path) for config, path, done in seen if done == 1}
    assert len(found["trials"]) == 7 and len([1 for _, _, done in seen if done == 1]) == len(trained)


def test_best_toml_has_no_flag_of_a_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "course", steady(lambda config: config.lr))
    (tmp_path / "c.toml").write_text(SMALL + 'overwrite = true\nmax-minutes = 5\ntrack = "mlflow"\nseed = 7\n')
    tuned(data, tmp_path / "run", trials=2, training=str(tmp_path / "c.toml"))
    given = read_toml(TrainConfig, str(tmp_path / "run/best.toml"))
    assert given["batch_size"] == 500 and not {"overwrite", "max_minutes", "track", "device"} & given.keys()


# What is held out ---------------------------------------------------------------------------------


def training_rows(dataset, split="train"):
    chunks = list(scan(dataset, split, range(len(dataset.manifest.lanes))))
    return sorted(zip(*(np.concatenate([chunk[k] for chunk in chunks]).tolist() for k in (1, 2, 3, 4)), strict=True))


def with_split(dataset, **split):
    dataset.manifest.split.update(split)
    return dataset


@pytest.mark.parametrize("kind", ["random", "given", "time", "last-n"])
def test_inner_splits_are_datasets_of_the_training_rows(data, tmp_path, kind):
    dataset = with_split(Dataset.open(data), kind=kind, fraction=0.2, last=2)
    found = inner_splits(dataset, str(tmp_path), 3, 7, Console(False))
    every = training_rows(dataset)
    for number, split in enumerate(found):
        split.check_files()
        split.check_vocabularies()
        Dataset.open(split.path)  # its manifest is believed
        train, held = training_rows(split), training_rows(split, "val")
        assert split.manifest.num_ratings == {"train": len(train), "val": len(held)}
        counts = np.bincount([row[0] for row in train], minlength=dataset.manifest.num_users)
        assert split.counts("users").tolist() == counts.tolist()
        assert split.manifest.global_mean == pytest.approx(np.mean([row[2] for row in train]))
        if kind in ("random", "given"):
            assert sorted(train + held) == every
        if kind in ("random", "time"):
            assert len(held) / (len(train) + len(held)) == pytest.approx(0.2, abs=0.03)
        if kind == "time":
            assert max(row[3] for row in train) <= min(row[3] for row in held)
        if kind == "last-n":
            newest = [sorted(row[3] for row in every if row[0] == user)[::-1] for user in range(5)]
            for user, times in enumerate(newest):
                mine = sorted((row[3] for row in held if row[0] == user), reverse=True)
                assert mine == times[2 * number : 2 * number + 2]
    helds = [set(training_rows(split, "val")) for split in found]
    assert helds[0] != helds[1] and (kind in ("random", "given") or not helds[0] & helds[1])
    assert inner_splits(dataset, str(tmp_path), 3, 7, Console(False))[0].manifest == found[0].manifest
    assert inner_splits(dataset, str(tmp_path), 1, 8, Console(False))[0].manifest.extra != found[0].manifest.extra


def test_a_user_of_one_rating_keeps_it(data):
    (rule,) = rules_of(with_split(Dataset.open(data), kind="last-n", last=1), 1, 0)
    rows = {"user": np.array([4, 7, 4]), "timestamp": np.array([9, 1, 3])}
    assert rule.fates(0, rows).tolist() == [HELD, TRAIN, TRAIN]
    (_, second) = rules_of(with_split(Dataset.open(data), kind="last-n", last=1), 2, 0)
    rows = {"user": np.array([4, 4, 4]), "timestamp": np.array([9, 1, 3])}
    assert second.fates(0, rows).tolist() == [DROPPED, TRAIN, HELD]


# What is searched ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr=0.005:0.1", Parameter("lr", 0.005, 0.1)),
        ("epochs=10:40", Parameter("epochs", 10, 40, whole=True)),
        ("l2=x0.3:x3", Parameter("l2", 0.3, 3, times=True)),
        ("emb_dim=32,64", Parameter("emb_dim", choices=("32", "64"))),
        ("emb-dim=x0.5,x1", Parameter("emb_dim", choices=("0.5", "1"), times=True)),
        ("--optimizer=sgd,adamw", Parameter("optimizer", choices=("sgd", "adamw"))),
        ("no-sigmoid=true,false", Parameter("no_sigmoid", choices=("true", "false"))),
        ("row-l2", Parameter("row_l2", *MULTIPLES["row_l2"], times=True)),
        ("eps", Parameter("eps", 0.3, 3.0, times=True)),
    ],
)
def test_forms_of_a_setting(word, expected):
    assert parse_search([word]) == (expected,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning-rate=1:2"], r"there is no setting 'learning-rate' to search\. Did you mean 'lr'\?"),
        (["data=a,b"], "no setting 'data'"),
        (["lr=0.1:0.01"], "LOW below HIGH"),
        (["lr=x1:x1e400"], "both finite"),
        (["lr=x1:3"], r"expected lr=LOW:HIGH, lr=A,B,C or lr=x0.3:x3"),
        (["lr=fast"], "expected a number, got 'fast'"),
        (["lr=-1,1"], "expected a number above 0"),
        (["l2=0.1:0.2"], "expected l2=x0.3:x3"),
        (["optimizer"], "it is no number; give its values, such as optimizer=A,B"),
        (["optimizer=sgd,best"], "expected one of"),
        (["emb-dim=8,8"], "expected emb-dim="),
        (["lr", "lr=0.1:0.2"], "names lr more than once"),
    ],
)
def test_what_is_no_setting_gets_a_sentence(words, said):
    with pytest.raises(UsageError, match=said):
        parse_search(words)


def test_multiples_follow_the_data(data, tmp_path):
    """On an inner split --l2 is another number than on all training rows; the multiple is the same."""
    outer = Dataset.open(data)
    (inner,) = inner_splits(outer, str(tmp_path), 1, 0, Console(False))
    chosen = {Parameter("l2", 0.3, 3, times=True): 2.0, Parameter("lr", 0.3, 3, times=True): 0.5}
    for dataset in (outer, inner):

        def fit(config, dataset=dataset):
            return fitted(config, dataset, World.alone())[0]

        plain, found = fit(TrainConfig(lr=TrainConfig().lr * 0.5)), settings_of({}, chosen, fit)
        assert found["lr"] == pytest.approx(TrainConfig().lr / 2, rel=1e-3)
        assert found["l2"] == pytest.approx([2 * part for part in plain.l2], rel=1e-3)
        assert "batch_size" not in found and "implicit" not in found
    assert fitted(TrainConfig(), outer, World.alone())[0].l2 != fitted(TrainConfig(), inner, World.alone())[0].l2


def test_what_is_zero_has_no_multiples():
    vignette = TrainConfig.ready("vignette_mf_advanced")
    assert [one.field for one in space_of((), vignette)] == ["lr", "epochs", "weight_decay"]
    assert [one.field for one in space_of((), TrainConfig.ready("ranking"))] == [
        "unobserved_weight", "ranking_penalty", "epochs",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="--search implicit: it is 0 or not set to begin with"):
        space_of(("implicit",), vignette)


def test_the_start_has_the_digits_that_a_trial_has():
    beginning = TrainConfig(lr=0.012345)
    assert start_of(space_of(("lr=0.001:0.1",), beginning), beginning) == {"lr": 0.01235}


def test_the_flag_that_names_a_file_is_the_one_that_is_said(data, tmp_path):
    with pytest.raises(UsageError, match="--training nosuch: there is no such file"):
        config(data, tmp_path / "run", training="nosuch")


def test_without_optuna_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install 'mfdist\[tune\]'"):
        config(data, tmp_path / "run")


def test_settings_of_other_rows_are_refused(data, tmp_path):
    (tmp_path / "c.toml").write_text("stop-fraction = 0.1\n")
    with pytest.raises(UsageError, match="stop-fraction holds out rows of its own; a search cannot"):
        config(data, tmp_path / "run", training=str(tmp_path / "c.toml"))


def test_a_ranking_is_searched_by_its_ndcg(data, tmp_path):
    (tmp_path / "ranking.toml").write_text('objective = "ranking"\nemb-dim = 8\nepochs = 2\n')
    found = tuned(data, tmp_path / "run", training=str(tmp_path / "ranking.toml"), search=(), trials=3)
    figures = [trial["figure"] for trial in found["trials"]]
    assert found["measure"] == "NDCG@10" and all(0 < figure < 1 for figure in figures)
    assert figures[found["best"] - 1] == max(figures)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the Debian package chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_finds_nothing_wrong(data, tmp_path, monkeypatch, dark):
    monkeypatch.setattr(search, "course", steady(lambda config: 1 + abs(math.log(config.lr / 0.02)) * config.emb_dim))
    tuned(data, tmp_path / "run", trials=12)
    assert browser.faults({"tune": (tmp_path / "run/tune.html").read_text()}, tmp_path, dark) == []

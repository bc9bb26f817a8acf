"""Every flag of every job: torchrun's own parser must hand it on to the job, and every flag says what it is."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from mfdist.__main__ import JOBS
from mfdist.config import parse_config, read_ready, read_toml, ready
from mfdist.errors import UsageError
from mfdist.flag_names import MEANINGS
from mfdist.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from document_jobs import config_class


@pytest.mark.parametrize("job", sorted(JOBS))
def test_torchrun_hands_every_flag_on(job: str) -> None:
    """Its parser takes any flag that begins like one of its own for that one, also behind the script."""
    names = [field.name for field in dataclasses.fields(config_class(job)) if not field.metadata["positional"]]
    for name in ["config", *names]:
        flag = "--" + name.replace("_", "-")
        for words in ([flag, "1"], [f"{flag}=1"]):
            args = torchrun.get_args_parser().parse_args(["--nproc_per_node=4", "jobs/job.py", *words])
            assert args.training_script_args == words, flag


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_flag_says_what_it_is(job: str) -> None:
    for field in dataclasses.fields(config_class(job)):
        assert len(field.metadata["help"]) > 8, field.name


def test_another_system_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(UsageError, match="WSL"):
        importlib.import_module("mfdist.jobs.train").main([])


def test_an_unknown_ready_configuration_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file, and no ready configuration of this name .*recipe"):
        importlib.import_module("mfdist.jobs.train").main(["--config", "recepi"])


def test_a_file_wins_over_a_ready_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_toml(TrainConfig, "quick.toml") == read_toml(TrainConfig, "quick")
    Path("quick.toml").write_text("epochs = 77\n")
    assert read_toml(TrainConfig, "quick.toml") == {"epochs": 77}
    assert TrainConfig.ready("quick").epochs != 77


def test_a_folder_of_the_name_of_a_ready_configuration_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ready():
        Path(name).mkdir()
    assert read_toml(TrainConfig, "quick") == read_ready(TrainConfig, "quick")
    assert TrainConfig.ready("svd").lr > 0
    with pytest.raises(UsageError, match="there is no such file"):
        read_toml(TrainConfig, str(tmp_path))


@pytest.mark.parametrize(
    ("job", "given", "meant"),
    [
        ("train", "--learning-rate", "--lr"), ("train", "--embedding_dim", "--emb-dim"), ("train", "--reg", "--l2"),
        ("train", "--random-state", "--seed"), ("train", "--output-dir", "--run-dir"), ("train", "--epoch", "--epochs"),
        ("train", "--dataset", "--data"), ("train", "--n-factors", "--emb-dim"), ("baseline", "--k", "--factors"),
        ("recommend", "--k", "--top-k"), ("recommend", "--output", "--out"),
        ("prepare", "--test-size", "--val-fraction"),
        ("prepare", "--mem=4GiB", "--memory"), ("plan", "--world-size", "--ranks"), ("predict", "--model", "--run-dir"),
        ("tune", "--n-trials", "--trials"), ("tune", "--lr", "--search"),
    ],
)  # fmt: skip
def test_an_unknown_flag_is_answered_with_the_one_that_means_it(job: str, given: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"Did you mean '{meant}'\?"):
        parse_config(config_class(job), [given, "1"], "")


def test_an_unknown_key_is_answered_with_the_one_that_means_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("learning_rate = 0.1\n")
    with pytest.raises(UsageError, match=r"unknown key 'learning_rate'. Did you mean 'lr'\?"):
        read_toml(TrainConfig, str(tmp_path / "c.toml"))


def test_what_a_flag_is_called_elsewhere_is_said_of_a_flag_that_there_is() -> None:
    known = {field.name.replace("_", "-") for job in JOBS for field in dataclasses.fields(config_class(job))}
    assert {flag for flags in MEANINGS for flag in flags.split()} <= known

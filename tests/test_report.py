"""The report: the contract's keys, valid JSON whatever happened, pages that need nothing else."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from datasets import make_dataset
from test_export import export

from mfdist import storage
from mfdist.config import read_toml, to_dict
from mfdist.metrics import SliceSums
from mfdist.results import report as reporting
from mfdist.results.error_sums import ErrorSums
from mfdist.results.run_page import run_page
from mfdist.training.config import TrainConfig

HEADLINE = {"val_rmse": 1.3, "val_mae": 1.0, "val_rmse_rounded": 1.35, "val_mae_rounded": 0.95,
            "val_rmse_clipped": 1.29, "val_mae_clipped": 0.99}  # fmt: skip


RANKING = {"users": 50, "of_users": 1200, "threshold": 4.0, "ndcg@10": 0.1, "recall@10": 0.2, "mrr@10": 0.3,
           "coverage@10": 0.4,
           "popularity": {"ndcg@10": 0.15, "recall@10": 0.1, "mrr@10": 0.2, "coverage@10": 0.01}}  # fmt: skip


def an_epoch(number, train=1.2, val=1.3):
    return {"epoch": number, "train_rmse": train, "val_rmse": val, "val_mae": 1.0, "seconds": 2.0,
            "ratings_per_second": 1e6}  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=300, lanes=3, val_rows=60)


def a_report(dataset, **changes):
    given = {
        "job": "train", "model": "mf_advanced", "manifest": dataset.manifest, "world_size": 2, "device": "cpu",
        "seed": 1,
        "config": {"data": "<script>alert(1)</script>", "lr": 0.0005, "lr_schedule": None, "betas": (0.9, 0.999)},
        "epochs": [an_epoch(1, 1.5, 1.4), an_epoch(2, 1.1, 1.3), an_epoch(3, 0.8, 1.35)],
        "final": reporting.result(2, HEADLINE, "last epoch"),
        "best_on_val": reporting.result(1, HEADLINE, reporting.BEST_CHOICE),
        "slices": SliceSums(1, 5, 1).summary()["slices"],
        "floors": {name: {"rmse": 1.38, "mae": 1.1} for name in ("global_mean", "item_mean", "bias")},
        "ranking": RANKING, "wall_seconds": 6.5,
    }  # fmt: skip
    return reporting.new_report(**(given | changes))


def test_keys_are_the_contract(dataset):
    report = a_report(dataset)
    assert set(report) == {"job", "model", "dataset", "world_size", "device", "seed", "config", "epochs", "final",
                           "best_on_val", "slices", "floors", "ranking", "wall_seconds", "peak_rss_bytes",
                           "peak_device_bytes",
                           "versions"}  # fmt: skip
    assert set(report["dataset"]) == {"name", "fingerprint", "num_users", "num_items", "num_ratings"}
    assert report["peak_rss_bytes"] > 1 << 20 and {"mfdist", "python", "torch"} <= set(report["versions"])


def test_written_json_reads_back(tmp_path, dataset):
    run = str(tmp_path / "run")
    report = a_report(dataset)
    reporting.write_report(run, report)
    assert json.loads(storage.read_text(storage.join(run, "report.json"))) == report


def test_nan_becomes_null(tmp_path, dataset):
    report = a_report(dataset, epochs=[an_epoch(0, float("nan"), float("inf"))], wall_seconds=np.float64(1.5))
    assert report["epochs"][0]["train_rmse"] is None and report["epochs"][0]["val_rmse"] is None
    reporting.write_report(str(tmp_path / "run"), report)
    json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=pytest.fail)


def test_missing_keys_are_our_own_bug(tmp_path, dataset):
    with pytest.raises(AssertionError, match="val_mae"):
        a_report(dataset, epochs=[{"epoch": 0}])
    with pytest.raises(AssertionError, match="floors"):
        reporting.write_report(str(tmp_path / "run"), {k: v for k, v in a_report(dataset).items() if k != "floors"})


def test_the_page_stands_alone_and_escapes(tmp_path, dataset):
    reporting.write_report(str(tmp_path / "run"), a_report(dataset))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for text in ("1.3000", "1.2900", "mean of the item", "neither seen in training", "last epoch", "vignette"):
        assert text in page, text


def test_the_plot_shows_both_curves(dataset):
    both = reporting.loss_plot(a_report(dataset))
    assert both.startswith(b"\x89PNG")
    assert both != reporting.loss_plot(a_report(dataset, epochs=[an_epoch(e, None, 1.3) for e in range(3)]))
    assert both != reporting.loss_plot(a_report(dataset, epochs=[an_epoch(e, 1.2, None) for e in range(3)]))


def test_a_run_without_epochs_still_has_a_page(tmp_path, dataset):
    floors = {"global_mean": {"rmse": None, "mae": None}}
    reporting.write_report(str(tmp_path / "run"), a_report(dataset, epochs=[], floors=floors))
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def heads_of(page):
    """Of the table of epochs; none where the page has none."""
    table = page.partition("<h2>Epochs</h2>")[2].partition("</thead>")[0]
    return [re.sub("<.*?>", "", head) for head in re.findall(r"<th.*?</th>", table)]


def test_the_table_of_epochs_has_no_empty_column(dataset):
    def page(**changes):
        epochs = [an_epoch(number) | changes for number in (1, 2)]
        return run_page(a_report(dataset, epochs=epochs))

    whole = ["epoch", "train RMSE", "val RMSE, clipped", "val MAE, clipped", "time", "M ratings/s"]
    assert heads_of(page()) == whole
    assert heads_of(page(val_rmse=None, val_mae=None)) == ["epoch", "train RMSE", "time", "M ratings/s"]
    assert heads_of(page(train_rmse=None, val_rmse=None, val_mae=None)) == []


def test_the_model_card_gets_the_figures(tmp_path, dataset):
    export(tmp_path / "run", dataset)
    figures = ErrorSums(dataset.manifest).figures() | {"rmse_interval": [1.2512, 1.3387]}
    reporting.write_report(str(tmp_path / "run"), a_report(dataset), figures)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| **this model**, epoch 2 | 1.2900 | 0.9900 |" in card and "RMSE is 1.2512 to 1.3387" in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "unknown"
    (figures,) = head["model-index"][0]["results"]
    assert figures["metrics"] == [{"type": "rmse", "value": 1.29}, {"type": "mae", "value": 0.99}]
    assert figures["dataset"]["name"] == dataset.manifest.name


def test_the_settings_of_the_model_card_are_those_of_the_run(tmp_path, dataset):
    """As a file for --config they give the configuration again; nothing of them is a path."""
    config = TrainConfig(data="here", run_dir="there", l2=(0.01, 0.0), implicit=0.2, batch_size=77, keep_every=5)
    export(tmp_path / "run", dataset)
    reporting.write_report(str(tmp_path / "run"), a_report(dataset, config=to_dict(config)))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "    mfdist train --config settings.toml --data DATA --run-dir RUN\n" in card and "there" not in card
    (tmp_path / "settings.toml").write_text(card.split("```toml\n")[1].split("```")[0])
    values = read_toml(TrainConfig, str(tmp_path / "settings.toml"))
    assert TrainConfig(**values, data="here", run_dir="there", keep_every=5) == config

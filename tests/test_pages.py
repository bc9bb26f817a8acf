"""Pages for people: they need nothing else, they escape what they show, and a browser finds nothing wrong with them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import browser
import numpy as np
import pytest
from datasets import make_dataset
from markupsafe import Markup
from test_export import export
from test_report import HEADLINE, a_report, an_epoch

from mfdist.cluster.world import World
from mfdist.pages.charts import Event, Interval, Level, Series, bar_chart, interval_chart, line_chart, row_chart
from mfdist.pages.page import percent, seconds
from mfdist.pages.scales import Scale, short, short_all, span
from mfdist.prepare.report import write_dataset_report
from mfdist.results.comparison_page import comparison_page
from mfdist.results.error_sums import ErrorSums
from mfdist.results.evaluate import EvaluateConfig, evaluate_runs
from mfdist.results.report import result
from mfdist.results.run_page import phase_seconds, run_page, work_seconds

RECORDS: list[dict[str, Any]] = [
    {"kind": "start", "time": 100.0, "step": 0, "epoch": 1, "world_size": 2},
    {"kind": "interval", "time": 103.0, "step": 5, "epoch": 1, "ratings_per_second": 2e6},
    {"kind": "checkpoint", "time": 104.0, "step": 6, "epoch": 1, "pause_seconds": 0.1},
    {"kind": "stop", "time": 104.5, "step": 6, "epoch": 1, "reason": "STOP"},
    {"kind": "resume", "time": 900.0, "step": 6, "epoch": 1, "world_size": 2},
    {"kind": "interval", "time": 903.0, "step": 12, "epoch": 2, "ratings_per_second": 3e6},
    {"kind": "compile", "time": 905.0, "step": 14, "epoch": 2, "seconds": 2.0},
    {"kind": "interval", "time": 905.0, "step": 14, "epoch": 2, "ratings_per_second": 3e6, "wait_seconds": 0.5,
     "ranks_wait_seconds": 0.2},
    {"kind": "epoch", "time": 906.0, "step": 14, "epoch": 2, "seconds": 5.0, "validation_seconds": 1.0},
    {"kind": "warning", "time": 906.5, "step": 14, "epoch": 2, "text": "too <high>"},
    {"kind": "finish", "time": 907.0, "step": 14, "epoch": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pages") / "data", rows=3000, lanes=3, val_rows=600)


@pytest.fixture(scope="module")
def pages(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        export(folder / name, dataset)
    config = EvaluateConfig(runs=(str(folder / "a"), str(folder / "b")), data=dataset.path)
    compared = evaluate_runs(config, World.alone())
    report = a_report(dataset, slices=compared["runs"][0]["slices"])
    dataset.manifest.extra["cold"] = {"cold_user": 1, "cold_item": 2, "cold_both": 0}
    activity = {1: 900, 2: 300, 3: 100, 40: 2}
    write_dataset_report(
        str(folder / "data"), dataset.manifest, activity, np.arange(50), {16000: 5, 16040: 9, 16100: 2}
    )
    return {
        "run": run_page(report, compared["runs"][0], RECORDS, "runs/a"),
        "run without anything": run_page(a_report(dataset, epochs=[], floors={})),
        "comparison": comparison_page(compared),
        "dataset": (folder / "data/report/index.html").read_text(),
    }


def test_pages_stand_alone_and_escape(pages):
    for name, text in pages.items():
        assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", text), name
        assert "<script" not in text and '<meta name="viewport"' in text, name
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages["run"] and "too &lt;high&gt;" in pages["run"]


def test_a_run_says_what_it_is_and_how_to_have_it_again(pages):
    for text in ("mfdist launch --nproc-per-node=2 train --config runs/a/config.toml", "Error by epoch", "restarted",
                 "user and item biases", "Training speed over time", "Residuals",
                 "Predicted against actual"):  # fmt: skip
        assert text in pages["run"], text
    for absent in ("Error by epoch", "Training speed", "Residuals"):
        assert absent not in pages["run without anything"], "a picture that says nothing"


def test_a_comparison_shows_the_interval_of_the_difference(pages):
    assert re.search(r"<td>[+-]\d\.\d{4} to [+-]\d\.\d{4}</td><td>no difference shown</td>", pages["comparison"])
    assert "most popular items" in pages["comparison"] and ">a against b<" in pages["comparison"]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the Debian package chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_finds_nothing_wrong(pages, tmp_path, dark):
    assert browser.faults(pages, tmp_path, dark) == []


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the Debian package chromium")
def test_the_browser_check_finds_faults(tmp_path):
    pages = {
        "wide": "<body><div style='width:2000px'>text</div>",
        "pale": "<body style='background:#fff'><p style='color:#bbb'>pale</p>",
        "drawing": "<body style='background:#fff'><svg viewBox='0 0 100 50' aria-label='d'>"
        "<text x='10' y='20'>abc</text><text x='12' y='22'>def</text><text x='95' y='20'>long label</text></svg>",
    }
    found = "\n".join(browser.faults(pages, tmp_path, dark=False))
    for text in ("wide at 1280 px: page is", "contrast 1.92", '"abc" on "def"', '"long label" leaves its drawing'):
        assert text in found, found


def test_work_time_leaves_pauses_out():
    assert work_seconds(RECORDS)[-1] == pytest.approx(4.5 + 7.0)
    assert phase_seconds(RECORDS) == pytest.approx(
        {
            "learning": 4.2,
            "waiting for data": 0.5,
            "waiting for ranks": 0.2,
            "checkpoints": 0.1,
            "validation": 1.0,
            "compiling": 2.0,
        }
    )


def test_error_sums_are_plain_counts(dataset):
    sums = ErrorSums(dataset.manifest)
    rating, prediction = np.array([1.0, 2.0, 5.0, 5.0], np.float32), np.array([1.2, 4.0, 7.0, 4.4])
    row = np.arange(4)
    sums.add(prediction, rating, row, row, (np.array([0, 1, 2, 3]), np.array([0, 0, 5, 5])))
    figures = sums.figures()
    expected = np.zeros((5, 5), int)
    expected[0, 0] = expected[1, 3] = expected[4, 4] = expected[4, 3] = 1
    assert figures["levels"]["rows"] == expected.tolist() and figures["levels"]["ratings"] == [1, 2, 3, 4, 5]
    assert sum(figures["residuals"]["rows"]) == 4 and figures["slices"]["cold_both"]["rows"] == 1
    low, high = figures["rmse_interval"]
    assert low <= figures["val_rmse_clipped"] <= high


def test_shares_that_are_not_none_are_not_shown_as_none():
    assert [percent(v) for v in (None, 0.0, 0.0002, 0.123)] == ["-", "0.0%", "0.02%", "12.3%"]


def test_epochs_begin_at_one_on_their_axis():
    chart = line_chart([Series("a", [(epoch, 1.0) for epoch in range(1, 41)])], "epoch", "y", whole_x=True)
    assert ">10<" in chart and ">0<" not in chart.split("epoch")[0]


def test_axes_have_round_ticks():
    assert Scale(0.0, 1.0, 0, 100).ticks(6) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Scale(0.6, 3.4, 0, 100).ticks(7, whole=True) == [1, 2, 3]
    assert Scale(0.8, 2e4, 0, 100, log=True).ticks() == [1, 10, 100, 1000, 10000]
    assert Scale(1, 100, 0, 100, log=True).at(10) == pytest.approx(50)
    assert span([]) == (0.0, 1.0) and span([5.0]) == (4.75, 5.25) and span([float("nan"), 2, 4], from_zero=True)[0] == 0
    assert [short(v) for v in (1234567, 35000, 0.95, 0)] == ["1.23 M", "35 k", "0.95", "0"]


def test_ticks_are_told_apart_by_as_many_digits_as_it_takes():
    assert short_all([1.296, 1.2961, 1.2962]) == ["1.296", "1.2961", "1.2962"]
    assert short_all([1_000_000.0, 1_000_500.0]) == ["1 M", "1.0005 M"]
    assert short_all([0.9, 1.0]) == ["0.9", "1"] and short_all([]) == []


def test_every_name_of_an_axis_has_its_place():
    drawing = str(line_chart([Series("a trial", [(1.0, 2.0), (2.0, 3.0)], "a", "dots")], "l2", "RMSE",
                                    names=["x1", "x2", "x3", "x5"]))  # fmt: skip
    places = [float(x) for x in re.findall(r'text-anchor="middle" x="([\d.]+)" y="[\d.]+">x\d', drawing)]
    assert len(places) == 4 and all(b - a > 20 for a, b in itertools.pairwise(places))


def test_what_is_all_but_equal_spans_little_of_an_axis():
    low, high = span([1.29600, 1.29601], least=5e-4)
    assert high - low == pytest.approx(5e-4 * 1.29601) and low < 1.296 < 1.29601 < high
    assert span([1.0, 2.0], least=5e-4) == span([1.0, 2.0])
    assert [seconds(v) for v in (0.44, 12.4, 200, 7500)] == ["0.4 s", "12 s", "3 min 20 s", "2 h 05 min"]


def test_charts_draw_what_they_are_given():
    chart = line_chart([Series("<a>", [(1, 1.0), (2, 0.5)], "a"), Series("b", [(1, 0.7)], "b")], "x", "y",
                       levels=[Level(0.9, "floor")], events=[Event(1.5, "stop: step 3")])  # fmt: skip
    assert isinstance(chart, Markup) and "&lt;a&gt;" in chart and "<a>" not in chart
    assert chart.count("<circle") == 3 and chart.count("<polyline") == 1 and "floor 0.9" in chart
    points = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert points is not None and float(points[1]) < float(points[3]) and float(points[2]) < float(points[4])
    assert bar_chart([("1", 3), ("2", 6)], "x", "y").count("<rect") == 2
    drawn = row_chart([("waiting", 0.1, "0.1 s"), ("learning", 60.0, "1 min 00 s")], "seconds")
    assert drawn.count("<rect") == 2 and ">waiting<" in drawn and ">1 min 00 s<" in drawn
    assert row_chart([], "x") == line_chart([], "x", "y") == bar_chart([], "x", "y") == interval_chart([], "x") == ""
    assert interval_chart([Interval("a", -0.1, -0.2, 0.1)], "x").count("<circle") == 1


def test_the_card_of_the_bias_floor_is_a_difference(dataset):
    floors = {"bias": {"rmse": 1.29 / 0.9, "mae": 1.0}}
    final = result(3, {**HEADLINE}, "last epoch")
    assert "-10.0%" in run_page(a_report(dataset, floors=floors, final=final, epochs=[an_epoch(1)]))

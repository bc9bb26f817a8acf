"""From files to a comparison: real ratings where they are at hand, the built-in ones everywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks

from jobs import baseline_svd, evaluate, prepare
from mfdist.cluster.world import World
from mfdist.config import read_toml
from mfdist.log import Console
from mfdist.synthetic.builtin import make_builtin
from mfdist.synthetic.synthesize import SynthesizeConfig, synthesize
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

QUIET = Console(speaks=False)
CONFIGS = Path(__file__).parents[1] / "mfdist" / "configs"
REAL = {
    "ratings_Electronics.head50698.csv": (50_698, 47_141, 3_529),
    "electronics-core164k.parquet": (164_007, 8_014, 6_727),
    "ml-100k.tsv": (100_000, 943, 1_682),
}


def train_all(world, configs):
    return [train(c, world, QUIET) for c in configs]


def vignettes(data, folder):
    """Both models with the vignette's configurations."""
    return [
        TrainConfig(
            data=data, run_dir=f"{folder}-{name}", device="cpu", **read_toml(TrainConfig, str(CONFIGS / f"{name}.toml"))
        )
        for name in ("vignette_mf", "vignette_mf_advanced")
    ]


@pytest.mark.parametrize(
    ("name", "most"), [*((name, 2) for name in REAL), *(pytest.param(name, 4, marks=pytest.mark.slow) for name in REAL)]
)
def test_real_ratings_from_file_to_comparison_on_any_ranks(name, most, tmp_path, capsys):
    folder = os.environ.get("MFDIST_TEST_DATA")
    if not folder:
        pytest.skip("MFDIST_TEST_DATA names no folder of real ratings")
    data = str(tmp_path / "data")
    assert prepare.main([os.path.join(folder, name), "--out", data]) == 0
    manifest = json.loads(Path(data, "dataset.json").read_text())
    assert (sum(manifest["num_ratings"].values()), manifest["num_users"], manifest["num_items"]) == REAL[name]
    curves = {}
    for ranks in (1, most):
        reports = run_ranks(ranks, train_all, vignettes(data, tmp_path / str(ranks)), timeout=240)[0]
        curves[ranks] = np.array([[[e["train_rmse"], e["val_rmse"]] for e in r["epochs"]] for r in reports])
    np.testing.assert_allclose(curves[most], curves[1], atol=1e-4)
    svd = str(tmp_path / "svd")
    assert baseline_svd.main(["--data", data, "--run-dir", svd]) == 0
    capsys.readouterr()
    runs = [svd, f"{tmp_path}/1-vignette_mf", f"{tmp_path}/1-vignette_mf_advanced"]
    assert evaluate.main([*runs, "--out", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out
    assert all(Path(run).name in shown for run in runs)


def test_built_in_ratings_are_learned_to_near_their_noise_floor(tmp_path):
    data, source = str(tmp_path / "builtin"), str(tmp_path / "same.csv")
    make_builtin(data)
    floor = synthesize(SynthesizeConfig(rows=200_000, out=source)).noise_floor["rmse"]
    c = TrainConfig.ready("vignette_mf_advanced", data=data, run_dir=str(tmp_path / "run"), device="cpu", lr=0.005)
    report = train(c, World.alone(), QUIET)
    assert floor < report["final"]["val_rmse"] < floor + 0.08
    assert report["final"]["val_rmse"] < report["floors"]["bias"]["rmse"]

"""Kernels compiled ahead: the jobs themselves, on few ratings that are soon done with, so that none is forgotten.

A part is a process of its own that runs some jobs; parts run beside each other, as many as there are cores:

    data              a file of ratings is prepared; the others wait for it, but for the next
    synthetic         ratings are made by synthesize
    training          a training by the recipe and one of the vignette's, then what is done with their models
    ranking           a training of a ranking
    processes         a training in two processes, which exchange item rows
    large NAME        the kernels for the very shape of a configuration, which a million ratings or more are worth
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mfdist import process, storage
from mfdist.cluster.launch import usable_cores
from mfdist.cluster.world import World
from mfdist.config import flag, ready
from mfdist.data.dataset import Dataset
from mfdist.errors import MfdistError, exit_code_of
from mfdist.log import Console, Progress

ROWS = 20_000
DATA, SYNTHETIC, TRAINING, RANKING, PROCESSES, LARGE = (
    "data", "synthetic", "training", "ranking", "processes", "large"
)  # fmt: skip
RANKINGS = ("ranking",)
"""Ready configurations that have no kernels for their very shape."""


def parse_names(text: str) -> tuple[str, ...]:
    """'all', or names of ready configurations with commas between them."""
    known = [name for name in ready() if name not in RANKINGS]
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected all, or some of {', '.join(known)} with commas between them, not {unknown[0]}")
    return tuple(names)


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Flags of jobs/compile.py."""

    processes: bool = flag(False, "also the kernels of a training in several processes")
    large: tuple[str, ...] = flag(
        (), "also the kernels that a training on a million ratings or more has for its very shape, of these ready "
        "configurations, or all of them", parse=parse_names, metavar="NAMES|all", example="recipe,quick",
    )  # fmt: skip


def compile_ahead(config: CompileConfig, console: Console) -> float:
    """Run the parts; returns the seconds that it took. MfdistError where one fails."""
    parts = [[TRAINING], [RANKING]]
    parts += [[PROCESSES]] if config.processes else []
    parts += [[LARGE, name] for name in config.large]
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="mfdist-compile-") as folder,
        console.progress("compiling kernels", 2 + len(parts), unit="parts") as progress,
        ThreadPoolExecutor(usable_cores()) as pool,
    ):
        first, other = (pool.submit(_run, folder, [part], progress) for part in (DATA, SYNTHETIC))
        first.result()
        for done in [other, *(pool.submit(_run, folder, part, progress) for part in parts)]:
            done.result()
    return time.monotonic() - began


def _run(folder: str, part: Sequence[str], progress: Progress) -> None:
    """A part in a process of its own, on two threads, which have kernels of their own: beside it others compile."""
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "mfdist.planning.warm_up", folder, *part]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(min(2, usable_cores()))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise MfdistError(f"the kernels of {' '.join(part)} could not be compiled: {storage.redact(said)}")
    progress.advance(1, " ".join(part))


# In the processes ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    folder, part, *rest = sys.argv[1:] if argv is None else argv
    if part == DATA:
        _make_data(folder)
    elif part == PROCESSES:
        _train_in_processes(folder)
    elif part == LARGE:
        _train_large(folder, *rest)
    else:
        parts: dict[str, Callable[[str], None]] = {TRAINING: _train, RANKING: _rank, SYNTHETIC: _synthesize}
        parts[part](folder)
    return 0


def _make_data(folder: str) -> None:
    from mfdist.prepare.config import PrepareConfig
    from mfdist.prepare.prepare import prepare

    rng = np.random.default_rng(0)
    rows = zip(rng.integers(0, 900, ROWS), rng.integers(0, 300, ROWS), rng.integers(1, 6, ROWS), strict=True)
    lines = (f"u{user},i{item},{rating}.0,{1_400_000_000 + 60 * user}\n" for user, item, rating in rows)
    Path(folder, "ratings.csv").write_text("user_id,item_id,rating,timestamp\n" + "".join(lines))
    prepare(PrepareConfig(sources=(f"{folder}/ratings.csv",), out=f"{folder}/data"), Console(False))


def _synthesize(folder: str) -> None:
    from mfdist.synthetic.synthesize import SynthesizeConfig, synthesize

    for preset in ("builtin", "electronics"):
        synthesize(SynthesizeConfig(preset=preset, rows=ROWS, out=f"{folder}/{preset}.csv"), Console(False))


def _one_training(folder: str, name: str, part: str) -> str:
    """A run of one epoch by the ready configuration ``name``; returns its directory."""
    from mfdist.training.config import TrainConfig
    from mfdist.training.train import train

    run = f"{folder}/{part}-{name}"
    train(TrainConfig.ready(name, data=f"{folder}/data", run_dir=run, epochs=1, device="cpu"), World.alone(),
          Console(False))  # fmt: skip
    return run


def _train(folder: str) -> None:
    from mfdist.results.evaluate import EvaluateConfig, evaluate_runs
    from mfdist.results.predict import PredictConfig, predict
    from mfdist.results.recommend import RecommendConfig, recommend
    from mfdist.results.similar import SimilarConfig, similar

    run = _one_training(folder, "recipe", TRAINING)
    other = _one_training(folder, "vignette_mf_advanced", TRAINING)
    world, quiet = World.alone(), Console(False)
    dataset, ratings = Dataset.open(f"{folder}/data"), f"{folder}/ratings.csv"
    evaluate_runs(EvaluateConfig(runs=(run, other)), world)
    recommend(RecommendConfig(run_dir=run, out=f"{folder}/best.parquet"), world, dataset, quiet)
    recommend(RecommendConfig(run_dir=run, out=f"{folder}/all.parquet", include_seen=True), world, dataset, quiet)
    similar(SimilarConfig(run_dir=run, out=f"{folder}/similar.parquet"), world, quiet)
    predict(PredictConfig(pairs=(ratings,), run_dir=run, out=f"{folder}/predicted.parquet", fold_in=(ratings,)), world,
            quiet)  # fmt: skip


def _rank(folder: str) -> None:
    _one_training(folder, "ranking", RANKING)


def _train_large(folder: str, name: str) -> None:
    from mfdist.model import cpu_step

    vars(cpu_step)["OWN_KERNELS_RATINGS"] = 0  # a process of its own, which ends here
    _one_training(folder, name, LARGE)


def _train_in_processes(folder: str) -> None:
    command = [sys.executable, "-m", "mfdist.launch", "--standalone", "--nproc-per-node=2", "-m", "mfdist.jobs.train",
               "--data", f"{folder}/data", "--run-dir", f"{folder}/processes", "--epochs", "1",
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MfdistError((done.stderr.strip() or "it said nothing").splitlines()[-1])


if __name__ == "__main__":
    process.end(exit_code_of(main))

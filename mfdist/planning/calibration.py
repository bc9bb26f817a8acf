"""A few seconds of the real training, to plan by. ``plan`` starts it, as ranks of ``mfdist.launch`` on this machine:

    python -m mfdist.launch --nproc-per-node=2 -m mfdist.planning.calibration ASKED.json FOUND.json

Everything is the training's own: loader, tables, kernels, the exchange between processes, evaluation, checkpoints.
The rows are as in the middle of a run, each touched at some step of the epoch before.

Where a job has more ranks than this machine takes, the first of them are measured, with their lanes and their rows of
each batch. Example: for 8 ranks of 64 lanes on two cores, two processes hold 8 lanes each, and take a quarter of each
batch together; the items are cut in two then, not in eight. Where even these do not fit into half of the free memory,
each takes fewer of its lanes: the tables are smaller, the rows of a step are as many.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfdist import process, storage
from mfdist.cluster.world import World
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset, Manifest
from mfdist.data.loader import Loader
from mfdist.errors import MfdistError, exit_code_of
from mfdist.log import Console
from mfdist.model.tables import Table
from mfdist.results import report
from mfdist.results.floors import floors
from mfdist.run import tensor_files
from mfdist.run.background_save import Saver
from mfdist.run.checkpoint import Retention
from mfdist.training.config import TrainConfig
from mfdist.training.session import Session, build, checkpoint_tensors, restore_or_initialise
from mfdist.training.train import CHECK_SECONDS, batches_of, train_step
from mfdist.training.validation import Validation

WARM_UP_STEPS = 10
LEAST_STEPS = 2000
"""So many are possible in the trial, however short the run: of small data a step is soon taken."""
SAMPLE_ROWS = 1 << 20
"""Training rows of a rank that the floors are tried on."""
VALIDATION_ROWS = 1 << 21
"""Validation rows of all ranks that are predicted."""
STORED_BYTES = 128 << 20
"""Of a rank, as a trial of a checkpoint."""
PATIENCE_SECONDS = 900.0
STOP_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to measure: a job of ``ranks``, of which the first ``processes`` run here, with ``lanes`` lanes each (None:
    all of theirs); ``seconds`` of steps."""

    ranks: int
    processes: int
    lanes: int | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trial found; seconds are the slowest process's, bytes the largest's."""

    trial: Trial
    threads: int
    largest_rows: int  # training rows of the process that has most
    start_seconds: float  # from the launcher's start to the first batch
    read_seconds: float  # the first pass over the ratings, where they stay in memory then
    steps: int
    step_seconds: float
    settle_seconds: float
    validation_rows: int
    evaluate_seconds: float  # of those
    floors_seconds: float  # of all of a rank's lanes
    stored_bytes: int  # by all processes
    pause_seconds: float
    store_seconds: float  # pause included
    peak_bytes: int


def measure(config: TrainConfig, trials: Sequence[Trial], threads: int) -> list[Measured]:
    """Run trials of one number of processes, one after the other, in one launch. MfdistError where it fails."""
    processes = trials[0].processes
    assert all(trial.processes == processes for trial in trials)
    folder = tempfile.mkdtemp("-mfdist-plan", dir=_beside(config.run_dir))
    try:
        asked, found = os.path.join(folder, "asked.json"), os.path.join(folder, "found.json")
        about = {
            "config": {**dataclasses.asdict(config), "run_dir": os.path.join(folder, "run")},
            "trials": [dataclasses.asdict(trial) for trial in trials], "began": time.time(),
        }  # fmt: skip
        Path(asked).write_text(json.dumps(about))
        command = [sys.executable, "-m", "mfdist.launch", "--standalone", f"--nproc-per-node={processes}", "-m",
                   "mfdist.planning.calibration", asked, found]  # fmt: skip
        code, said = _launched(command, _environment(threads))
        if code:
            raise MfdistError(
                f"the trial on this machine failed: {_said(said)} --calibrate-seconds 0 plans without times."
            )
        return [Measured(**{**one, "trial": Trial(**one["trial"])}) for one in json.loads(Path(found).read_text())]
    except subprocess.TimeoutExpired:
        raise MfdistError(
            f"the trial on this machine took more than {PATIENCE_SECONDS:.0f} s; --calibrate-seconds 0 plans without "
            "times."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _launched(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run the launcher; (exit code, stderr). However this call ends, its workers do not outlive it."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            _, said = launcher.communicate(timeout=PATIENCE_SECONDS)
        except BaseException:  # time, Ctrl-C, a signal that a job answers
            launcher.terminate()  # which it passes on; killed, it would leave its workers training
            try:
                launcher.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                launcher.kill()
            raise
    return launcher.returncode, said


def lanes_that_fit(config: TrainConfig, manifest: Manifest, trial: Trial, row_bytes: int, free: int) -> int | None:
    """How many lanes each process of a trial can take within ``free`` bytes; None where not one fits."""
    for lanes in range(lanes_of_process(manifest, trial), 0, -1):
        tried = share_of(manifest, dataclasses.replace(trial, lanes=lanes))
        users = sum(lane.num_users for lane in tried.lanes)
        whole = trial.processes if config.sharding == "replicated" else 1
        if (users + manifest.num_items) * whole * row_bytes <= free:
            return lanes
    return None


def share_of(manifest: Manifest, trial: Trial, lanes: int | None = None) -> Manifest:
    """The manifest of the lanes that the processes of a trial have; of each, the first ``lanes`` where it is given."""
    owned = [lanes_of_rank(len(manifest.lanes), rank, trial.ranks) for rank in range(trial.processes)]
    if trial.ranks != trial.processes or trial.lanes is not None or lanes is not None:
        least = min(n for n in (lanes_of_process(manifest, trial), trial.lanes, lanes) if n is not None)
        owned = [numbers[:least] for numbers in owned]
    chosen = tuple(manifest.lanes[number] for numbers in owned for number in numbers)
    ratings = {"train": sum(lane.train_rows for lane in chosen), "val": sum(lane.val_rows for lane in chosen)}
    return dataclasses.replace(manifest, lanes=chosen, num_ratings=ratings)


def lanes_of_process(manifest: Manifest, trial: Trial) -> int:
    """Lanes of the process that has fewest."""
    return min(len(lanes_of_rank(len(manifest.lanes), rank, trial.ranks)) for rank in range(trial.processes))


def _beside(run: str | None) -> str | None:
    """The folder that a run will be made in, where it stands already: its disk is the one to try."""
    if run is None or not storage.is_local(run):
        return None
    parent = os.path.dirname(os.path.abspath(storage.local_path(run)))
    return parent if os.access(parent, os.W_OK) else None


def _environment(threads: int) -> dict[str, str]:
    """This process's, without what a scheduler or launcher says about another job."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("PET_", "TORCHELASTIC_", "SLURM_", "MASTER_", "JOB_COMPLETION"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    }  # fmt: skip
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), kept.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def _said(text: str) -> str:
    lines = [line for line in text.splitlines() if any(letter.isalpha() for letter in line)]
    said = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "it said nothing.")
    return storage.redact(said.removeprefix("error: "))


# In the processes ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    asked, found = sys.argv[1:] if argv is None else argv
    about = json.loads(Path(asked).read_text())
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in about["config"].items()
    }
    config = TrainConfig(**{**values, "resume": "auto", "device": "cpu"})
    with World.open("cpu") as world:
        loaded, answers = time.time() - about["began"], []
        for trial in about["trials"]:
            answers.append(_try(config, Trial(**trial), world, loaded))
            if world.is_main:
                shutil.rmtree(config.run_dir or "", ignore_errors=True)
        if world.is_main:
            Path(found).write_text(json.dumps([dataclasses.asdict(answer) for answer in answers]))
    return 0


def _try(config: TrainConfig, trial: Trial, world: World, loaded: float) -> Measured:
    began = time.monotonic()
    dataset = Dataset.open(config.data or "")
    manifest = share_of(dataset.manifest, trial)
    share = Dataset(dataset.path, manifest)
    batch = _batch_of(config, dataset.manifest, trial)
    with Loader(
        share, batch_size=batch, seed=config.seed, rank=world.rank, world_size=world.size,
        stop_fraction=config.stop_fraction, reduce=world.sum,
    ) as loader:  # fmt: skip
        epochs = max(config.epochs, 2 + LEAST_STEPS // max(loader.num_steps, 1))
        session = build(dataclasses.replace(config, epochs=epochs), share, world, Console(False), loader)
        try:
            restore_or_initialise(session)
            start = loaded + time.monotonic() - began
            reading = _read(loader, trial.seconds)
            _settle(session)  # on a machine that never ran it, this compiles
            if config.epochs > 1:
                _age(session)
            steps, spent = _steps(session, trial.seconds)
            settling = _seconds(_settle, session)
            rows, predicting = _predict(session, trial)
            checking = _floors(session, trial)
            stored, pause, storing = _store(session)
        finally:
            session.saver.close()
            if session.fused:
                session.fused.close()
    lanes = lanes_of_rank(len(manifest.lanes), world.rank, world.size)
    held = sum(manifest.lanes[lane].train_rows for lane in lanes)
    largest = world.max([start, reading, spent / steps, settling, predicting, checking, held, report.peak_rss()])
    return Measured(
        trial=trial, threads=torch.get_num_threads(), start_seconds=largest[0], read_seconds=largest[1], steps=steps,
        step_seconds=largest[2], settle_seconds=largest[3], validation_rows=rows, evaluate_seconds=largest[4],
        floors_seconds=largest[5], largest_rows=int(largest[6]), peak_bytes=int(largest[7]), stored_bytes=stored,
        pause_seconds=pause, store_seconds=storing,
    )  # fmt: skip


def _batch_of(config: TrainConfig, manifest: Manifest, trial: Trial) -> int:
    """The rows that the processes of a trial have of a batch, together; with fewer lanes they are as many."""
    whole = share_of(manifest, dataclasses.replace(trial, lanes=None)).num_ratings["train"]
    return max(1, round(config.batch_size * whole / max(manifest.num_ratings["train"], 1)))


def _seconds(work: Any, *arguments: Any) -> float:
    began = time.monotonic()
    work(*arguments)
    return time.monotonic() - began


def _read(loader: Loader, most: float) -> float:
    """Seconds of a pass over the ratings without training, where later ones find them in memory; else 0."""
    if not loader.stats.resident:
        return 0.0
    began, read = time.monotonic(), 0
    for _ in loader.epoch(0):
        read += 1
        if time.monotonic() - began > most and 8 * read >= loader.num_steps:  # many batches come at once
            break
    return (time.monotonic() - began) * loader.num_steps / max(read, 1)


def _age(session: Session) -> None:
    """The tables as after an epoch: every row was touched, at some step of it, and has momentum."""
    steps = session.loader.num_steps
    if session.config.sharding == "replicated":
        return
    for table in (session.model.user, session.model.item):
        _touch(table, steps)
    session.progress.step = steps


def _touch(table: Table, steps: int) -> None:
    table.step = steps
    table.rows.last.random_(1, steps + 1)
    for state in table.rows.state:
        state.fill_(1e-4)


def _steps(session: Session, seconds: float) -> tuple[int, float]:
    """(steps, seconds) of the training's loop; every rank stops at the same one."""
    total = session.loader.num_steps * session.config.epochs
    left, steps, next_check = total - session.progress.step, 0, WARM_UP_STEPS
    pending: list[torch.Tensor] = []
    began, spent = time.monotonic(), 0.0
    while True:
        for batch in batches_of(session, 0):
            pending.append(train_step(session, batch))
            steps += 1
            if steps < next_check and steps < left:
                continue
            np.sum(session.world.gather(torch.stack(pending).cpu().numpy()), axis=0)
            spent, *_ = session.world.max([time.monotonic() - began, *[0.0] * 7])
            pending = []
            if steps == WARM_UP_STEPS < left:
                began, spent = time.monotonic(), 0.0
            elif spent >= seconds or steps == left:
                return max(1, steps - WARM_UP_STEPS), float(spent)
            pace = spent / max(1, steps - WARM_UP_STEPS)
            next_check = steps + max(1, min(50, int(CHECK_SECONDS / max(pace, 1e-6))))


def _settle(session: Session) -> None:
    (session.fused or session.model).settle()
    session.world.barrier()


def _predict(session: Session, trial: Trial) -> tuple[int, float]:
    """(validation rows, seconds) of evaluating the tables on them, the second time where that is soon done."""
    manifest = session.dataset.manifest
    most = VALIDATION_ROWS * len(manifest.lanes) // max(manifest.num_ratings["val"], 1)
    part = _sample(session, trial, most)
    validation = Validation(part, session.world, session.config.cold == "known-side")
    spent = _seconds(validation.errors, session.model)
    if not session.world.any(spent > trial.seconds):
        spent = _seconds(validation.errors, session.model)
    return part.manifest.num_ratings["val"], spent


def _floors(session: Session, trial: Trial) -> float:
    """Seconds of the floors over this rank's lanes, from some of them."""
    manifest, world = session.dataset.manifest, session.world
    most = SAMPLE_ROWS * world.size * len(manifest.lanes) // max(manifest.num_ratings["train"], 1)
    part = _sample(session, trial, most)
    return _seconds(floors, part, world) * len(manifest.lanes) / len(part.manifest.lanes)


def _sample(session: Session, trial: Trial, most_lanes: int) -> Dataset:
    """The dataset of the trial with the first lanes of each process, ``most_lanes`` of them together."""
    dataset, size = session.dataset, session.world.size
    if most_lanes >= len(dataset.manifest.lanes):
        return dataset
    here = dataclasses.replace(trial, ranks=size, lanes=max(1, most_lanes // size))
    return Dataset(dataset.path, share_of(dataset.manifest, here))


def _store(session: Session) -> tuple[int, float, float]:
    """(bytes of all ranks, seconds of the pause, seconds until COMMIT) of a checkpoint of a part of the tables."""
    tensors: tensor_files.Tensors = {}
    room = STORED_BYTES
    for name, tensor in checkpoint_tensors(session, every_part=False).items():
        rows = min(len(tensor), room // max(1, tensor[0:1].nbytes)) if tensor.ndim == 2 else 0
        if rows:
            tensors[f"{session.world.rank}.{name}"] = tensor[:rows]
            room -= rows * tensor[0:1].nbytes
    saver = Saver(session.run, session.world, Retention(1))
    try:
        began = time.monotonic()
        saver.begin(1, tensors, {}, None)
        done = saver.wait()
    finally:
        saver.close()
    assert done is not None
    stored = session.world.sum([sum(tensor.nbytes for tensor in tensors.values())])
    return int(stored[0]), float(done["pause_seconds"]), time.monotonic() - began


if __name__ == "__main__":
    process.end(exit_code_of(main))

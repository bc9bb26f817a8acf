"""Training: from a prepared dataset to two tables, a report and an export, on any number of ranks.

:func:`train` is the table of contents; :func:`train_step` is the step. Every function with a ``world`` or a session is
collective: every rank calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mfdist import compilation, json_tables, storage
from mfdist.cluster.world import World
from mfdist.config import to_dict
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Batch, Loader
from mfdist.errors import DataError, DivergedError, MfdistError, StopRequested
from mfdist.log import Console
from mfdist.model.autograd_step import autograd_step
from mfdist.run import directory
from mfdist.run.about import REMEDY
from mfdist.run.lease import Lease
from mfdist.run.stopping import StopWatch
from mfdist.training.announcement import announce, epoch_line
from mfdist.training.config import TrainConfig
from mfdist.training.data_facts import fitted
from mfdist.training.epoch_results import measure_epoch
from mfdist.training.finish import finish
from mfdist.training.memory import check_memory
from mfdist.training.meter import Meter
from mfdist.training.resumed_config import check_changes
from mfdist.training.session import (
    Session,
    build,
    chosen_epoch,
    follow_background_save,
    restore_or_initialise,
    save,
    wait_for_save,
)
from mfdist.training.trackers import open_trackers

CHECK_SECONDS = 0.5
"""About how often the ranks agree on whether to stop and look at the loss."""


def train(config: TrainConfig, world: World, console: Console | None = None) -> dict[str, Any] | None:
    """Run or continue a training run; returns the report (None where the run had finished before).

    StopRequested (75) after a checkpoint; DivergedError (4) where the loss is no number; UsageError, DataError.
    """
    console = console or Console(world.is_main)
    config = _with_places(config, world, console)
    assert config.data is not None
    dataset = Dataset.open(config.data)
    if not dataset.manifest.num_ratings["train"]:
        raise DataError(f"{storage.redact(dataset.path)} has no training ratings.")
    dataset.check_vocabularies()
    with console.busy("counting the ratings of users and items"):
        config, dataset = fitted(config, dataset, world)
    check_memory(config, dataset.manifest, world)
    assert config.run_dir is not None
    with contextlib.ExitStack() as held:
        with console.busy("opening the run directory"):
            may_save = held.enter_context(_hold(config.run_dir, world, console))
            fresh = _open_run(config, dataset, world, console)
        if not fresh:
            return None
        return _train(config, dataset, world, console, may_save)


def _train(
    config: TrainConfig, dataset: Dataset, world: World, console: Console, may_save: Callable[[], None]
) -> dict[str, Any]:
    watched = config.run_dir if world.is_main else None
    with console.busy("looking at the dataset's files"):
        opened = _open_loader(config, dataset, world)
    with StopWatch(watched, config.max_minutes) as watch, opened as loader:
        with console.busy("making the model and its steps"):
            session = build(config, dataset, world, console, loader, may_save)
        trackers = open_trackers(session.run, config.track, to_dict(config), console.warn) if world.is_main else None
        try:
            with console.busy("filling the tables"):
                restore_or_initialise(session, trackers.record if trackers else None)
            announce(session)
            with collector_at_ease():
                for epoch in range(session.progress.epoch, config.epochs):
                    due, reason = _train_epoch(session, epoch, watch)
                    _finish_epoch(session, epoch, due or reason is not None)
                    if _out_of_patience(session):
                        break
                    if reason and epoch + 1 < config.epochs:
                        _stop(session, reason, watch)
            return finish(session)
        finally:
            session.saver.close()
            if session.fused:
                session.fused.close()
            if trackers:
                with console.busy("handing the last figures to the trackers"):
                    trackers.close()


@contextlib.contextmanager
def collector_at_ease() -> Iterator[None]:
    """Python's collector of circular garbage looks at what is made from now on alone: its passes over all that torch
    and numba keep took a twentieth of the steps at batch 8192."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train_step(session: Session, batch: Batch) -> torch.Tensor:
    """One optimizer step on the global batch: returns this rank's sum of squared errors, float64, on its device, in
    the form's units.

    The loss is the sum over all ranks' rows divided by their number; DDP's reduction adds, it does not average.
    """
    model, step = session.model, session.progress.step + 1
    if session.fused:
        sum_of_squares = _fused_step(session, batch)
    else:
        rate = session.optimizer.rate(step)
        sum_of_squares = autograd_step(session.replica, model, session.objective, session.shares, batch, rate)
    if model.offset is not None and model.offset.requires_grad:
        assert model.offset.grad is not None
        weight, grad = model.offset.data.view(1, 1), model.offset.grad.view(1, 1)
        if session.objective.reduction == "sum":  # every rating has a part in it: their mean, lest it leap
            grad /= batch.global_rows * max(model.form.members, 1)
        session.optimizer.update(weight, session.offset_state, grad, step)
        grad.zero_()
    session.progress.step, session.progress.step_in_epoch = step, batch.step + 1
    return sum_of_squares


def batches_of(session: Session, epoch: int, start_step: int = 0) -> Iterator[Batch]:
    """The batches of an epoch from ``start_step`` on, for :func:`train_step`; the step looks ahead where that pays."""
    batches = session.loader.epoch(epoch, start_step)
    return batches if session.fused is None else session.fused.follow(batches)


def _fused_step(session: Session, batch: Batch) -> torch.Tensor:
    """The tables move in forward; backward is the offset's."""
    assert session.fused is not None
    rating = session.model.form.units.values(batch.rating)
    loss = session.replica(batch.user, batch.item, rating, batch.global_rows)
    if loss.requires_grad:
        loss.backward()
    return session.fused.squared_error


# Setting up ---------------------------------------------------------------------------------------


def _with_places(config: TrainConfig, world: World, console: Console) -> TrainConfig:
    """The configuration with its data and run directories settled, the same on every rank."""
    places: tuple[str, str] | Exception | None = None
    if world.is_main:
        try:
            data = config.data or _builtin_data(console)
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            places = data, config.run_dir or directory.numbered(restarted)
        except Exception as error:
            places = error
    settled: Any = world.broadcast(places)
    if isinstance(settled, Exception):
        raise settled
    data, run = settled
    if config.run_dir is None:
        console.info(f"run directory: {run}")
    return dataclasses.replace(config, data=data, run_dir=run).found_from_anywhere()


def _builtin_data(console: Console) -> str:
    """Make the built-in dataset where it is missing: 200,000 synthetic ratings, prepared."""
    path = directory.BUILTIN
    if not storage.exists(storage.join(path, "dataset.json")):
        console.info(f"making the built-in dataset (synthetic) under {path}")
        from mfdist.synthetic.builtin import make_builtin

        make_builtin(path, console=console)
    return path


@contextlib.contextmanager
def _hold(run: str, world: World, console: Console) -> Iterator[Callable[[], None]]:
    """Hold the run directory, by rank 0; yields what raises there once another job has taken it over."""
    with contextlib.ExitStack() as stack:
        lease = None
        failure: Exception | None = None
        if world.is_main:
            try:
                lease = stack.enter_context(Lease(run, console.info))
            except MfdistError as error:
                failure = error
        failure = world.broadcast(failure)
        if failure is not None:
            raise failure
        yield lease.check if lease else lambda: None


def _open_run(config: TrainConfig, dataset: Dataset, world: World, console: Console) -> bool:
    """Prepare the run directory on rank 0; False where the run had finished before."""
    outcome: Any = None
    assert config.run_dir is not None
    if world.is_main:
        try:
            before = directory.prepare(
                config.run_dir, config, dataset, job="train", resume=config.resume, overwrite=config.overwrite
            )
            done = directory.finished_epochs(config.run_dir)
            lines = check_changes(before, config, done is not None) if before is not None else []
            finished = done is not None and (done >= config.epochs or _ended_early(config.run_dir))
            if before is not None and not finished:
                directory.update(config.run_dir, config, dataset, "train")
            outcome = (lines, finished)
        except Exception as error:
            outcome = error
    outcome = world.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    lines, finished = outcome
    for line in lines:
        console.info(f"changed since the run began: {line}")
    if finished:
        console.info(f"{storage.redact(config.run_dir)} has finished before; its report is report.html there.")
    return not finished


def _ended_early(run: str) -> bool:
    """Whether a finished run ended by its patience: more epochs would not continue it."""
    path = storage.join(run, "report.json")
    return bool(json_tables.field(path, "config", dict[str, Any], REMEDY).get("patience"))


def _open_loader(config: TrainConfig, dataset: Dataset, world: World) -> Loader:
    return Loader(
        dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
        stop_fraction=config.stop_fraction, device=world.device, reduce=world.sum,
    )  # fmt: skip


# Running ------------------------------------------------------------------------------------------


def _train_epoch(session: Session, epoch: int, watch: StopWatch) -> tuple[bool, str | None]:
    """Returns whether a checkpoint is due at its end, and why to stop there, where the last step found a reason."""
    progress, began = session.progress, time.monotonic()
    compiled, seconds_before = compilation.seconds(), progress.seconds
    pending: list[torch.Tensor] = []
    save_due, reason, last_check = False, None, began
    next_check = progress.step + 1
    meter = Meter(session)
    total = session.loader.num_rows
    with session.console.progress(f"epoch {epoch + 1}/{session.config.epochs}", total, progress.rows) as bar:
        for batch in batches_of(session, epoch, progress.step_in_epoch):
            pending.append(train_step(session, batch))
            progress.rows += batch.global_rows
            bar.advance(batch.global_rows, meter.shown)
            due = _step_due(session)
            if progress.step >= next_check or due or progress.step_in_epoch == session.loader.num_steps:
                steps, spent = len(pending), time.monotonic() - last_check
                reason, minutes_due, slowest = _check(session, pending, watch, spent, meter)
                pending, last_check = [], time.monotonic()
                next_check = progress.step + max(1, min(50, int(CHECK_SECONDS * steps / max(slowest, 1e-6))))
                progress.seconds = seconds_before + last_check - began - (compilation.seconds() - compiled)
                last = progress.step_in_epoch == session.loader.num_steps
                meter.write(epoch, at_once=last or bool(reason) or due or minutes_due)
                if reason and not last:  # a whole epoch is evaluated first, and saved there
                    _stop(session, reason, watch)
                save_due = due or minutes_due
                if save_due and not last:
                    save(session)
    progress.seconds = seconds_before + time.monotonic() - began - (compilation.seconds() - compiled)
    return save_due, reason


def _check(
    session: Session, pending: list[torch.Tensor], watch: StopWatch, spent: float, meter: Meter
) -> tuple[str | None, bool, float]:
    """One collective: add up the losses of the last steps, and agree on whether to stop or to save.

    Returns (why to stop, a checkpoint by minutes is due, the slowest rank's seconds).
    """
    world, progress = session.world, session.progress
    reason = watch.reason()
    cadence = session.config.checkpoint_every
    minutes_due = cadence.endswith("m") and time.monotonic() - session.saved_at >= 60 * int(cadence[:-1])
    losses = torch.stack(pending).cpu().numpy()
    arrived = time.monotonic()
    summed = np.sum(world.gather(losses), axis=0)  # in rank order: a reduction's order varies with its length
    meter.waited(time.monotonic() - arrived)
    summed *= session.model.form.units.spread**2
    flags = [float(reason is not None), float(minutes_due and world.is_main), spent, *session.saver.flags()]
    stop, due, slowest, saving, failed, *most = world.max([*flags, *meter.values()])
    meter.take(most)
    follow_background_save(session, saving, failed)
    bad = np.flatnonzero(~np.isfinite(summed))
    if len(bad):
        wait_for_save(session)
        step = progress.step_in_epoch - len(pending) + int(bad[0])
        last = directory.newest_checkpoint_step(session.run) if world.is_main else None
        kept = f"; the checkpoint of step {last} is kept" if last is not None else ""
        session.metrics.write("diverged", step=progress.step, epoch=progress.epoch + 1, bad_step=step)
        raise DivergedError(
            f"the loss became NaN or infinite in epoch {progress.epoch + 1}, batch {step}{kept}. "
            f"Lower --lr (now {session.config.lr:g}) and start a new run."
        )
    for value in summed:  # one by one: how many steps a check covers is a matter of time, the sum must not be
        progress.squared_error += float(value)
    if stop:
        reason = next(text for text in world.gather(reason) if text)
    return (reason if stop else None), bool(due), float(slowest)


def _step_due(session: Session) -> bool:
    cadence = session.config.checkpoint_every
    return cadence.isdigit() and session.progress.step % int(cadence) == 0


def _stop(session: Session, reason: str, watch: StopWatch) -> None:
    save(session)
    wait_for_save(session)
    if session.world.is_main:
        session.metrics.write("stop", step=session.progress.step, epoch=session.progress.shown_epoch, reason=reason)
        watch.clear_stop_file()
    session.metrics.publish()
    raise StopRequested(
        f"{reason}; the checkpoint of step {session.progress.step} is written, run the same command again to go on."
    )


def _finish_epoch(session: Session, epoch: int, due: bool) -> None:
    """Settle, evaluate, record, save where it is ``due``, or this is an epoch that is kept in any case."""
    progress, config = session.progress, session.config
    with session.console.busy("bringing every row up to date"):
        (session.fused or session.model).settle()
    compiled = compilation.seconds()
    record, measured, summary = measure_epoch(session, epoch)
    session.console.info(epoch_line({**record, **measured}, config.epochs))
    progress.epochs.append(record)
    progress.summaries.append(summary)
    if compilation.seconds() > compiled:
        seconds = compilation.seconds() - compiled
        session.metrics.write("compile", step=progress.step, epoch=epoch + 1, seconds=seconds)
    session.metrics.write("epoch", step=progress.step, **record, **measured)
    progress.epoch, progress.step_in_epoch = epoch + 1, 0
    progress.squared_error, progress.rows, progress.seconds = 0.0, 0, 0.0
    if due or config.checkpoint_every == "epoch" or config.stop_fraction or progress.epoch == config.epochs:
        save(session)


def _out_of_patience(session: Session) -> bool:
    patience = session.config.patience
    return patience is not None and len(session.progress.epochs) - 1 - chosen_epoch(session.progress) >= patience

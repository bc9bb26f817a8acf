"""Training: from a prepared dataset to two tables, a report and an export, on any number of ranks.

:func:`train` is the table of contents; :func:`train_step` is the step. Every function with a ``world`` is collective:
every rank calls.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mfdist import checkpoint, export, report, run_directory, storage
from mfdist.config import to_dict
from mfdist.dataset import Dataset
from mfdist.distributed import World
from mfdist.embedding import ReplicatedTable, ShardedTable, Table, item_layout, stored_order, user_layout
from mfdist.errors import DataError, DivergedError, StopRequested, UsageError
from mfdist.floors import floors
from mfdist.loader import Batch, Loader
from mfdist.log import Console, MetricsLog
from mfdist.metrics import SliceSums
from mfdist.model import ITEM_TABLE, MF, USER_TABLE, MFAdvanced
from mfdist.optim import RowOptimizer
from mfdist.stopping import StopWatch
from mfdist.train_config import TrainConfig, check_changes
from mfdist.validate import Validation

CHECK_SECONDS = 0.5
"""About how often the ranks agree on whether to stop and look at the loss."""


@dataclass
class Progress:
    """What must survive a restart, but for the tables: the same on every rank."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    squared_error: float = 0.0  # of this epoch's rows so far, all ranks
    rows: int = 0
    seconds: float = 0.0  # spent training in this epoch so far
    epochs: list[dict[str, Any]] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)  # SliceSums.summary() of each epoch
    stop_rmse: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0


@dataclass
class Session:
    """Everything that a run works with."""

    config: TrainConfig
    run: str
    dataset: Dataset
    world: World
    console: Console
    loader: Loader
    model: MF
    replica: nn.Module  # the model under DistributedDataParallel, where it has anything to reduce
    optimizer: RowOptimizer
    offset_state: tuple[torch.Tensor, ...]
    validation: Validation
    progress: Progress
    metrics: MetricsLog
    started: float
    saved_at: float
    saved_step: int = -1


def train(config: TrainConfig, world: World, console: Console | None = None) -> dict[str, Any] | None:
    """Run or continue a training run; returns the report (None where the run had finished before).

    StopRequested (75) after a checkpoint; DivergedError (4) where the loss is no number; UsageError, DataError.
    """
    console = console or Console(world.is_main)
    config = _with_places(config, world, console)
    assert config.data is not None and config.run is not None
    dataset = Dataset.open(config.data)
    _check_dataset(dataset, config)
    if not _open_run(config, dataset, world, console):
        return None
    with StopWatch(config.run, config.max_minutes) as watch, _open_loader(config, dataset, world) as loader:
        session = _build(config, dataset, world, console, loader)
        _restore_or_initialise(session)
        for epoch in range(session.progress.epoch, config.epochs):
            _train_epoch(session, epoch, watch)
            _finish_epoch(session, epoch)
            if _out_of_patience(session):
                break
        return _finish(session)


def train_step(session: Session, batch: Batch) -> torch.Tensor:
    """One optimizer step on the global batch: returns this rank's sum of squared errors, float64, on its device.

    The loss is the sum over all ranks' rows divided by their number; DDP's reduction adds, it does not average.
    """
    scored = session.replica(batch.user, batch.item)
    error = scored.prediction - batch.rating
    loss = error.square().sum() / batch.global_rows
    if any(session.config.l2):
        loss = loss + _penalty(session, scored.user, scored.item) / batch.global_rows
    loss.backward()
    model, step = session.model, session.progress.step + 1
    model.user.apply_gradient()
    model.item.apply_gradient()
    if model.offset is not None:
        assert model.offset.grad is not None
        weight, grad = model.offset.data.view(1, 1), model.offset.grad.view(1, 1)
        session.optimizer.update(weight, session.offset_state, grad, step)
    session.model.zero_grad(set_to_none=False)
    session.progress.step, session.progress.step_in_epoch = step, batch.step + 1
    return error.detach().double().square().sum()


def _penalty(session: Session, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
    """L2 per rating, on the rating's own rows: factors and biases apart."""
    dim = session.model.form.dim
    factors, biases = session.config.l2
    rows = torch.cat([user, item])
    return factors * rows[:, :dim].square().sum() + biases * rows[:, dim:].square().sum()


# Setting up ---------------------------------------------------------------------------------------


def _with_places(config: TrainConfig, world: World, console: Console) -> TrainConfig:
    """The configuration with its data and run directories settled, the same on every rank."""
    places: tuple[str, str] | Exception | None = None
    if world.is_main:
        try:
            data = config.data or _builtin_data(console)
            restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            places = data, config.run or run_directory.numbered(restarted)
        except Exception as error:
            places = error
    settled = world.broadcast(places)
    if isinstance(settled, Exception):
        raise settled
    data, run = settled
    if config.run is None:
        console.info(f"run directory: {run}")
    return dataclasses.replace(config, data=data, run=run)


def _builtin_data(console: Console) -> str:
    """Make the built-in dataset where it is missing: 200,000 synthetic ratings, prepared."""
    path = run_directory.BUILTIN
    if not storage.exists(storage.join(path, "dataset.json")):
        console.info(f"making the built-in dataset (synthetic) under {path}")
        from mfdist.builtin import make_builtin

        make_builtin(path)
    return path


def _check_dataset(dataset: Dataset, config: TrainConfig) -> None:
    manifest = dataset.manifest
    if not manifest.num_ratings["train"]:
        raise DataError(f"{storage.redact(dataset.path)} has no training ratings.")


def _open_run(config: TrainConfig, dataset: Dataset, world: World, console: Console) -> bool:
    """Prepare the run directory on rank 0; False where the run had finished before."""
    outcome: Any = None
    assert config.run is not None
    if world.is_main:
        try:
            before = run_directory.prepare(
                config.run, config, dataset, job="train", resume=config.resume, overwrite=config.overwrite
            )
            lines = check_changes(before["config"], config) if before else []
            done = run_directory.finished_epochs(config.run)
            finished = done is not None and (done >= config.epochs or _ended_early(config.run))
            if before and not finished:
                run_directory.update(config.run, config, dataset, "train")
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
        console.info(f"{storage.redact(config.run)} has finished before; its report is report.html there.")
    return not finished


def _ended_early(run: str) -> bool:
    """Whether a finished run ended by its patience: more epochs would not continue it."""
    return bool(json.loads(storage.read_text(storage.join(run, "report.json")))["config"].get("patience"))


def _open_loader(config: TrainConfig, dataset: Dataset, world: World) -> Loader:
    return Loader(
        dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
        stop_fraction=config.stop_fraction, device=world.device, reduce=world.sum,
    )  # fmt: skip


def _build(config: TrainConfig, dataset: Dataset, world: World, console: Console, loader: Loader) -> Session:
    manifest = dataset.manifest
    form = config.form(manifest)
    optimizer = config.row_optimizer(loader.num_steps * config.epochs)
    user: Table
    item: Table
    users, items = user_layout(manifest, world.size), item_layout(manifest, world.size)
    if config.sharding == "replicated":
        user, item = (ReplicatedTable(layout, form.width, optimizer, world) for layout in (users, items))
    else:
        wire = torch.bfloat16 if config.wire_dtype == "bf16" else torch.float32
        user = ShardedTable(users, form.width, optimizer, world, at_home=True)
        item = ShardedTable(items, form.width, optimizer, world, at_home=False, wire_dtype=wire)
    model = (MF if config.model == "mf" else MFAdvanced)(form, user, item)
    replica = world.replicate(model)
    console.info(
        f"{manifest.name}: {loader.num_rows:,} training ratings, {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"order {manifest.order}; {config.model}, {loader.num_steps:,} steps of {config.batch_size:,} an epoch, "
        f"{world.size} {'rank' if world.size == 1 else 'ranks'} on {world.device.type}, "
        f"tables {'whole on each rank' if config.sharding == 'replicated' else 'cut by rows'}"
    )
    if replica is model and world.size > 1:
        console.info("nothing is replicated in this model, so it runs without DistributedDataParallel")
    assert config.run is not None
    return Session(
        config, config.run, dataset, world, console, loader, model, replica, optimizer,
        tuple(torch.zeros(1, w, device=world.device) for w in optimizer.state_widths(1)),
        Validation(dataset, world, config.cold == "known-side"), Progress(), MetricsLog(None), time.monotonic(), time.monotonic(),
    )  # fmt: skip


def _restore_or_initialise(session: Session) -> None:
    """Take the newest good checkpoint, or the initial values."""
    config, world, run = session.config, session.world, session.run
    folder = None
    if config.resume not in ("auto", "never"):
        folder = config.resume
    else:
        step = checkpoint.newest_good(run, world, session.console.warn)
        folder = checkpoint.folder_of(run, step) if step is not None else None
    if folder is not None:
        _restore(session, folder)
    else:
        for table, number in ((session.model.user, USER_TABLE), (session.model.item, ITEM_TABLE)):
            table.initialise(lambda first, end, number=number: session.model.form.initial(config.seed, number, first, end))
        if config.init_from:
            _init_from(session, config.init_from)
    path = storage.join(run, "metrics.jsonl") if world.is_main else None
    session.metrics = MetricsLog(path, session.progress.step if folder else None)
    kind = "resume" if folder else "start"
    session.metrics.write(kind, step=session.progress.step, epoch=session.progress.epoch, world_size=world.size)


def _restore(session: Session, folder: str) -> None:
    state = session.world.broadcast(checkpoint.read_state(folder) if session.world.is_main else None)
    epoch, step = session.loader.check_state(state["loader"])
    checkpoint.load(folder, _checkpoint_tensors(session, every_part=session.config.sharding == "replicated"))
    session.progress = Progress(**state["progress"])
    assert (epoch, step) == (session.progress.epoch, session.progress.step_in_epoch)
    session.model.user.step = session.model.item.step = session.saved_step = session.progress.step
    if session.config.sharding == "replicated":
        session.model.user.settle()
        session.model.item.settle()
    session.console.info(f"continuing at epoch {epoch + 1}, step {step} from {storage.redact(folder)}")


def _init_from(session: Session, run: str) -> None:
    """Begin with the exported model of another run, whose rows are the first ones of these tables."""
    exported = export.ExportedModel.open(run)
    form, world = session.model.form, session.world
    if exported.config["dim"] != form.dim or exported.has_biases != form.bias:
        raise UsageError(f"--init-from {storage.redact(run)}: that model has another --emb-dim or other biases.")
    for side, table in (("user", session.model.user), ("item", session.model.item)):
        factors = exported.tensors[f"{side}_embedding"]
        if len(factors) > table.layout.num_rows:
            raise UsageError(f"--init-from {storage.redact(run)}: it has more {side}s than this dataset.")

        def rows(first: int, end: int, side: str = side, factors: Any = factors) -> torch.Tensor:
            number = USER_TABLE if side == "user" else ITEM_TABLE
            weight = form.initial(session.config.seed, number, first, end)
            known = max(0, min(end, len(factors)) - first)
            weight[:known, : form.dim] = torch.from_numpy(np.array(factors[first : first + known]))
            if form.bias:
                weight[:known, form.dim] = torch.from_numpy(np.array(exported.tensors[f"{side}_bias"][first : first + known]))
            return weight

        table.initialise(rows)
    if session.model.offset is not None:
        session.model.offset.data.copy_(torch.from_numpy(np.array(exported.tensors["offset"])).to(world.device))


# Running ------------------------------------------------------------------------------------------


def _train_epoch(session: Session, epoch: int, watch: StopWatch) -> None:
    progress, began, waited = session.progress, time.monotonic(), session.loader.stats.wait_seconds
    seconds_before = progress.seconds
    pending: list[torch.Tensor] = []
    next_check, last_check = progress.step + 1, began
    total = session.loader.num_rows
    with session.console.progress(f"epoch {epoch + 1}/{session.config.epochs}", total, progress.rows) as bar:
        for batch in session.loader.epoch(epoch, progress.step_in_epoch):
            pending.append(train_step(session, batch))
            progress.rows += batch.global_rows
            bar.advance(batch.global_rows, lambda: f"rmse {(progress.squared_error / max(1, progress.rows)) ** 0.5:.4f}")
            due = _step_due(session)
            if progress.step >= next_check or due or progress.step_in_epoch == session.loader.num_steps:
                steps, spent = len(pending), time.monotonic() - last_check
                reason, minutes_due, slowest = _check(session, pending, watch, spent)
                pending, last_check = [], time.monotonic()
                next_check = progress.step + max(1, min(50, int(CHECK_SECONDS * steps / max(slowest, 1e-6))))
                progress.seconds = seconds_before + time.monotonic() - began
                last = progress.step_in_epoch == session.loader.num_steps
                if reason and not last:  # a whole epoch is evaluated first, and saved there
                    _stop(session, reason, watch)
                if (due or minutes_due) and not last:
                    _save(session)
    progress.seconds = seconds_before + time.monotonic() - began
    waited = session.loader.stats.wait_seconds - waited
    session.metrics.write("data", step=progress.step, epoch=epoch, wait_seconds=waited, seconds=progress.seconds)


def _check(session: Session, pending: list[torch.Tensor], watch: StopWatch, spent: float) -> tuple[str | None, bool, float]:
    """One collective: add up the losses of the last steps, and agree on whether to stop or to save.

    Returns (why to stop, a checkpoint by minutes is due, the slowest rank's seconds).
    """
    world, progress = session.world, session.progress
    reason = watch.reason()
    cadence = session.config.checkpoint_every
    minutes_due = cadence.endswith("m") and time.monotonic() - session.saved_at >= 60 * int(cadence[:-1])
    losses = torch.stack(pending).cpu().numpy()
    summed = world.sum(losses)
    stop, due, slowest = world.max([float(reason is not None), float(minutes_due and world.is_main), spent])
    bad = np.flatnonzero(~np.isfinite(summed))
    if len(bad):
        step = progress.step_in_epoch - len(pending) + int(bad[0])
        last = run_directory.newest_checkpoint_step(session.run) if world.is_main else None
        kept = f"; the checkpoint of step {last} is kept" if last is not None else ""
        session.metrics.write("diverged", step=progress.step, epoch=progress.epoch, bad_step=step)
        raise DivergedError(
            f"the loss became NaN or infinite in epoch {progress.epoch + 1}, batch {step}{kept}. "
            f"Lower --lr (now {session.config.lr:g}) and start a new run."
        )
    progress.squared_error += float(summed.sum())
    if stop:
        reason = next(text for text in world.gather(reason) if text)
    return (reason if stop else None), bool(due), float(slowest)


def _step_due(session: Session) -> bool:
    cadence = session.config.checkpoint_every
    return cadence.isdigit() and session.progress.step % int(cadence) == 0


def _stop(session: Session, reason: str, watch: StopWatch) -> None:
    _save(session)
    if session.world.is_main:
        session.metrics.write("stop", step=session.progress.step, epoch=session.progress.epoch, reason=reason)
        watch.clear_stop_file()
    session.metrics.publish()
    raise StopRequested(
        f"{reason}; the checkpoint of step {session.progress.step} is written, run the same command again to go on."
    )


def _finish_epoch(session: Session, epoch: int) -> None:
    """Settle, evaluate, record, save."""
    progress, config = session.progress, session.config
    session.model.user.settle()
    session.model.item.settle()
    began = time.monotonic()
    summary = session.validation.errors(session.model).summary()
    record = {
        "epoch": epoch,
        "train_rmse": (progress.squared_error / max(1, progress.rows)) ** 0.5,
        "val_rmse": summary["headline"]["val_rmse"],
        "val_mae": summary["headline"]["val_mae"],
        "seconds": progress.seconds,
        "ratings_per_second": progress.rows / max(progress.seconds, 1e-9),
    }
    line = f"epoch {epoch + 1}/{config.epochs} | train rmse {record['train_rmse']:.4f}"
    if record["val_rmse"] is not None:
        line += f" | val rmse {record['val_rmse']:.4f} mae {record['val_mae']:.4f}"
    if config.stop_fraction:
        stop: SliceSums = session.validation.errors(session.model, "stop", config.stop_fraction, config.seed)
        progress.stop_rmse.append(stop.summary()["headline"]["val_rmse"] or 0.0)
        line += f" | stop rows {progress.stop_rmse[-1]:.4f}"
    session.console.info(
        f"{line} | {record['seconds']:.1f} s + {time.monotonic() - began:.1f} s to evaluate | "
        f"{record['ratings_per_second'] / 1e6:.3f} M ratings/s"
    )
    progress.epochs.append(record)
    progress.summaries.append(summary)
    session.metrics.write("epoch", step=progress.step, **record)
    progress.epoch, progress.step_in_epoch = epoch + 1, 0
    progress.squared_error, progress.rows, progress.seconds = 0.0, 0, 0.0
    if config.checkpoint_every == "epoch" or config.stop_fraction or progress.epoch == config.epochs:
        _save(session)


def _chosen_epoch(progress: Progress) -> int:
    """The epoch that ``final`` reports: the last one, or the best on the stop rows."""
    return int(np.argmin(progress.stop_rmse)) if progress.stop_rmse else len(progress.epochs) - 1


def _out_of_patience(session: Session) -> bool:
    patience = session.config.patience
    return patience is not None and len(session.progress.epochs) - 1 - _chosen_epoch(session.progress) >= patience


# Saving -------------------------------------------------------------------------------------------


def _checkpoint_tensors(session: Session, every_part: bool) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: this rank's parts, or all parts (to load whole tables)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, table in (("user", session.model.user), ("item", session.model.item)):
        parts = range(len(table.layout.parts)) if every_part else table.layout.parts_of(session.world.rank)
        for part in parts:
            for key, tensor in table.part(part).tensors().items():
                if tensor.numel():
                    tensors[f"{name}.part-{part:05d}.{key}"] = tensor.detach()
    if session.model.offset is not None:
        tensors["offset"] = session.model.offset.data
        tensors |= {f"offset.state{k}": state for k, state in enumerate(session.offset_state)}
    return tensors


def _save(session: Session) -> None:
    progress, config, world = session.progress, session.config, session.world
    if session.saved_step == progress.step:
        return
    began = time.monotonic()
    progress.wall_seconds += began - session.started
    session.started = began
    state = {
        "loader": session.loader.state(progress.epoch, progress.step_in_epoch),
        "progress": vars(progress).copy(),
        "config": to_dict(config),
        "world_size": world.size,
    }
    written = checkpoint.save(session.run, progress.step, _checkpoint_tensors(session, every_part=False), state, world)
    session.saved_step, session.saved_at = progress.step, time.monotonic()
    if world.is_main:
        per_epoch = session.loader.num_steps
        checkpoint.prune(session.run, config.keep, (_chosen_epoch(progress) + 1) * per_epoch if progress.epochs else None)
    session.metrics.write(
        "checkpoint", step=progress.step, epoch=progress.epoch, seconds=session.saved_at - began, bytes=written
    )
    session.metrics.publish()


# Finishing ----------------------------------------------------------------------------------------


def _finish(session: Session) -> dict[str, Any]:
    """Export the epoch that ``final`` reports and write the report."""
    progress, config, world = session.progress, session.config, session.world
    chosen = _chosen_epoch(progress)
    if chosen != len(progress.epochs) - 1:
        folder = checkpoint.folder_of(session.run, (chosen + 1) * session.loader.num_steps)
        checkpoint.load(folder, _checkpoint_tensors(session, every_part=config.sharding == "replicated"))
    _export(session)
    how = "lowest error on the stop rows" if progress.stop_rmse else "last epoch"
    val = [summary["headline"]["val_rmse"] for summary in progress.summaries]
    best = int(np.argmin([np.inf if v is None else v for v in val]))
    peak = world.max([report.peak_rss(), torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0])
    found = report.new_report(
        job="train", model=config.model, manifest=session.dataset.manifest, world_size=world.size,
        device=world.device.type, seed=config.seed, config=to_dict(config), epochs=progress.epochs,
        final=report.result(chosen, progress.summaries[chosen]["headline"], how),
        best_on_val=report.result(best, progress.summaries[best]["headline"], "best on validation (the vignette's convention)"),
        slices=progress.summaries[chosen]["slices"], floors=floors(session.dataset, world),
        wall_seconds=progress.wall_seconds + time.monotonic() - session.started,
        peak_rss_bytes=int(peak[0]), peak_device_bytes=int(peak[1]),
    )  # fmt: skip
    if world.is_main:
        session.metrics.write("finish", step=progress.step, epoch=progress.epoch, wall_seconds=found["wall_seconds"])
        session.metrics.publish()
        _write_tensorboard(session)
        report.write_report(session.run, found)
    final = found["final"]
    if final["val_rmse"] is not None:
        session.console.info(
            f"result (epoch {chosen + 1}, {how}): RMSE {final['val_rmse']:.4f}, MAE {final['val_mae']:.4f} on "
            f"{found['dataset']['num_ratings']['val']:,} validation ratings; report: {storage.redact(session.run)}/report.html"
        )
    world.barrier()
    return found


def _export(session: Session) -> None:
    """RUN/model: rank 0 writes, the owners send their rows part by part."""
    form, world, manifest = session.model.form, session.world, session.dataset.manifest
    shapes: dict[str, tuple[tuple[int, ...], Iterable[Any]]] = {}
    for side, table in (("user", session.model.user), ("item", session.model.item)):
        rows = table.layout.num_rows
        shapes[f"{side}_embedding"] = ((rows, form.dim), _chunks(session, table, slice(0, form.dim)))
        if form.bias:
            shapes[f"{side}_bias"] = ((rows,), _chunks(session, table, form.dim))
    if session.model.offset is not None:
        shapes["offset"] = ((1,), [session.model.offset.detach().cpu().numpy()])
    about = {
        "model": form.model, "dim": form.dim, "bias": form.bias, "sigmoid": form.sigmoid_range is not None,
        "sigmoid_range": list(form.sigmoid_range) if form.sigmoid_range else None, "cold": session.config.cold,
    }  # fmt: skip
    if world.is_main:
        export.write_model(session.run, shapes, about, Dataset(session.dataset.path, manifest))
    else:
        for _, chunks in shapes.values():
            for _ in chunks:
                pass
    world.barrier()


def _chunks(session: Session, table: Table, columns: slice | int) -> Iterator[Any]:
    """float32 chunks of some columns of a table in global row order; on rank 0 all rows, elsewhere this rank sends its own."""
    world, zero = session.world, session.config.cold == "known-side"
    for part, first, end in stored_order(table.layout):
        owner = 0 if isinstance(table, ReplicatedTable) else table.layout.owner_of_part(part)
        if owner == world.rank:
            start = int(table.local(torch.tensor([first]))[0])
            rows = np.ascontiguousarray(table.current(start, start + end - first, zero)[:, columns].numpy())
            if world.is_main:
                yield rows
            else:
                world.send(torch.from_numpy(rows), to=0)
        elif world.is_main:
            width = (end - first,) if isinstance(columns, int) else (end - first, columns.stop)
            received = torch.empty(width)
            world.receive(received, owner)
            yield received.numpy()


def _write_tensorboard(session: Session) -> None:
    """The curves for TensorBoard, once, from what metrics.jsonl holds; local run directories only."""
    if not storage.is_local(session.run):
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = storage.join(storage.local_path(session.run), "tensorboard")
    storage.remove(folder)
    with SummaryWriter(folder) as writer:  # type: ignore[no-untyped-call]
        for record in session.progress.epochs:
            for key in ("train_rmse", "val_rmse", "val_mae", "ratings_per_second"):
                if record[key] is not None:
                    writer.add_scalar(key, record[key], record["epoch"])  # type: ignore[no-untyped-call]

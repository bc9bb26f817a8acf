"""A run at work: its tables, loader and progress, and how these are stored in a checkpoint and taken from one.

Every function with a session is collective: every rank calls.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from mfdist import json_tables, storage
from mfdist.cluster.world import World
from mfdist.config import to_dict
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader, available_bytes
from mfdist.errors import DataError
from mfdist.log import Console, MetricsLog, Record
from mfdist.model.alternating import AlternatingStep
from mfdist.model.cpu_step import FusedStep
from mfdist.model.models import ITEM_TABLE, MF, USER_TABLE, MFAdvanced
from mfdist.model.objective import Floats32, Objective, shares_of
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import ReplicatedTable, Rows, ShardedTable, Table, item_layout, user_layout
from mfdist.run import checkpoint, tensor_files
from mfdist.run.background_save import Saver
from mfdist.run.checkpoint import Retention
from mfdist.training.config import TrainConfig
from mfdist.training.continuation import begin_with
from mfdist.training.validation import Validation

if TYPE_CHECKING:
    from mfdist.model.gpu_step import GpuStep

T = TypeVar("T")


Shares = tuple[Floats32, Floats32]
Columns = dict[str, dict[str, tuple[int, int]]]
"""Of a table: stored block -> key of ``Rows.tensors()`` -> its first and one past its last column in the block."""


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

    @property
    def shown_epoch(self) -> int:
        """The epoch of the last step, from 1, as people and files count; 1 before the first step."""
        return max(1, self.epoch + (self.step_in_epoch > 0))


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
    fused: FusedStep | GpuStep | AlternatingStep | None  # the step by fast kernels, where they are to be had
    replica: nn.Module  # the model under DistributedDataParallel, where it has anything to reduce
    optimizer: RowOptimizer
    objective: Objective
    shares: Shares | None  # one over the training ratings of this rank's user rows and of all items, where needed
    offset_state: tuple[torch.Tensor, ...]
    validation: Validation
    progress: Progress
    metrics: MetricsLog
    saver: Saver
    started: float
    saved_at: float
    saved_step: int = -1


def build(
    config: TrainConfig, dataset: Dataset, world: World, console: Console, loader: Loader,
    may_save: Callable[[], None] | None = None,
) -> Session:  # fmt: skip
    """``may_save`` raises where the run directory is another job's by now; rank 0 calls it before each COMMIT."""
    manifest = dataset.manifest
    form = config.form(manifest)
    optimizer = config.row_optimizer(loader.num_steps * config.epochs)
    user: Table
    item: Table
    users, items = user_layout(manifest, world.size), item_layout(manifest, world.size)
    if config.sharding == "replicated":
        user, item = (
            ReplicatedTable(layout, form.stored_width(side), optimizer, world)
            for side, layout in ((USER_TABLE, users), (ITEM_TABLE, items))
        )
    else:
        wire = torch.bfloat16 if config.wire_dtype == "bf16" else torch.float32
        user = ShardedTable(users, form.stored_width(USER_TABLE), optimizer, world, at_home=True)
        item = ShardedTable(items, form.width, optimizer, world, at_home=False, wire_dtype=wire)
    if config.model == "mf":
        model = MF(form, user, item)
    else:
        mean = (manifest.global_mean - form.units.mean) / form.units.spread
        model = MFAdvanced(form, user, item, mean if config.offset == "mean" else None)
    world.interface = config.interface
    objective = config.penalties()
    shares = _shares(dataset, user) if objective.penalised or form.implicit else None
    fused = fast_step(config, model, optimizer, objective, shares, loader.num_rows)
    adds_up = isinstance(fused, FusedStep) and not fused.needs_reduction
    replica = (fused or model) if adds_up else world.replicate(fused or model)
    assert config.run_dir is not None
    return Session(
        config, config.run_dir, dataset, world, console, loader, model, fused, replica, optimizer, objective, shares,
        tuple(torch.zeros(1, w, device=world.device) for w in optimizer.state_widths(1)),
        Validation(dataset, world, config.cold == "known-side"), Progress(), MetricsLog(None),
        Saver(config.run_dir, world, Retention(config.keep, config.keep_every), may_save),
        time.monotonic(), time.monotonic(),
    )  # fmt: skip


def fast_step(
    config: TrainConfig, model: MF, optimizer: RowOptimizer, objective: Objective, shares: Shares | None, ratings: int
) -> FusedStep | GpuStep | AlternatingStep | None:
    """The step by kernels: numba's on a CPU, Triton's on a GPU; None where tables are whole, where Triton is missing
    and where its kernels do not have the model. ``ratings``: of an epoch, over all ranks."""
    if config.is_ranking:
        return AlternatingStep(model, config.unobserved_weight, config.ranking_penalty, torch.get_num_threads())
    if config.sharding == "replicated":
        return None
    if model.user.world.device.type == "cpu":
        return FusedStep(model, optimizer, objective, torch.get_num_threads(), shares, ratings)
    if importlib.util.find_spec("triton") is None:
        return None
    from mfdist.kernels.gpu_arguments import has_kernel
    from mfdist.model.gpu_step import GpuStep

    if not has_kernel(model.form.dim, model.form.members, model.form.implicit > 0):
        return None
    return GpuStep(model, optimizer, objective, shares)


def _shares(dataset: Dataset, user: Table) -> Shares:
    counts = [dataset.counts("users", first, end) for first, end in user.held]
    return shares_of(np.concatenate([np.empty(0, np.int64), *counts])), shares_of(dataset.counts("items"))


def restore_or_initialise(session: Session, listen: Callable[[Record], None] | None = None) -> None:
    """Take the newest good checkpoint, or the initial values. ``listen``: gets the records kept, and those to come."""
    config, world, run = session.config, session.world, session.run
    folder = config.resume_path
    if folder is None:
        step = checkpoint.newest_good(run, world, session.console.warn)
        folder = checkpoint.folder_of(run, step) if step is not None else None
    if folder is not None:
        _restore(session, folder)
    else:
        initialise(session)
    path = storage.join(run, "metrics.jsonl") if world.is_main else None
    session.metrics = MetricsLog(path, session.progress.step if folder else None, listen)
    session.console.instead(lambda text: session.metrics.write("console", step=session.progress.step, text=text))
    kind = "resume" if folder else "start"
    session.metrics.write(kind, step=session.progress.step, epoch=session.progress.shown_epoch, world_size=world.size)


def initialise(session: Session) -> None:
    """Fill the tables with the initial values of the configuration."""
    config = session.config
    for table, number in ((session.model.user, USER_TABLE), (session.model.item, ITEM_TABLE)):
        table.initialise(partial(session.model.form.initial, config.seed, number))
    if config.init_from:
        begin_with(config.init_from, session.model, session.dataset, config.seed)


def _restore(session: Session, folder: str) -> None:
    state = session.world.first_error(lambda: read_state(folder))
    epoch, step = session.loader.check_state(state.loader)
    if (epoch, step) != (state.progress.epoch, state.progress.step_in_epoch) or state.progress.step < 0:
        raise json_tables.damaged(folder, "its loader and its progress are at different steps", checkpoint.REMEDY)
    load(session, folder, state)
    session.progress = state.progress
    session.model.user.step = session.model.item.step = session.saved_step = session.progress.step
    if session.config.sharding == "replicated":
        session.model.user.settle()
        session.model.item.settle()
    session.console.info(f"continuing at epoch {epoch + 1}, step {step} from {storage.redact(folder)}")


@dataclass(frozen=True)
class State:
    """What ``state.json`` of a checkpoint says."""

    loader: dict[str, Any]
    progress: Progress
    config: dict[str, Any]
    columns: dict[str, Columns]
    world_size: int


def read_state(folder: str) -> State:
    """DataError where ``folder`` is no committed checkpoint, or a damaged one."""
    table = checkpoint.read_state(folder)
    try:
        state: State = json_tables.typed(State, table, "")
        if set(state.columns) != {"user", "item"}:
            raise ValueError("columns are not of users and items")
    except ValueError as error:
        raise json_tables.damaged(folder, error, checkpoint.REMEDY) from None
    return state


def load(session: Session, folder: str, state: State | None = None) -> None:
    """Fill the tables and the offset from a checkpoint of any number of ranks and either placement."""
    columns = (state or session.world.first_error(lambda: read_state(folder))).columns
    session.world.first_error(lambda: _load(session, folder, columns))


def _load(session: Session, folder: str, columns: dict[str, Columns]) -> None:
    every_part = session.config.sharding == "replicated"
    mine = checkpoint_tensors(session, every_part)
    for name, table in _tables(session):
        if columns[name] != _columns(table):
            prefix = f"{name}.part-"
            mine = {key: tensor for key, tensor in mine.items() if not key.startswith(prefix)}
            _load_columns(folder, name, table, _parts(session, table, every_part), columns[name])
    tensor_files.read(folder, mine)


def _load_columns(folder: str, name: str, table: Table, parts: range, columns: Columns) -> None:
    """Fill parts from a checkpoint that lays a row's values out in another way, one part at a time."""
    stored = tensor_files.sizes(folder)
    for part in parts:
        targets = table.part(part).tensors()
        for block, keys in columns.items():
            full = f"{name}.part-{part:05d}.{block}"
            if not len(targets["weight"]):
                continue
            if full not in stored or not keys.keys() <= targets.keys():
                raise DataError(f"{storage.redact(folder)}: {full} is missing or belongs to another optimizer.")
            held = torch.empty(stored[full])
            tensor_files.read(folder, {full: held})
            for key, (first, end) in keys.items():
                target = targets[key]
                fits = held.ndim == 2 and 0 <= first <= end <= held.shape[1]
                if not fits or (end - first) * len(held) != target.numel():
                    raise DataError(f"{storage.redact(folder)}: {full} does not hold what its columns say.")
                value = held[:, first:end].contiguous().view(target.dtype)
                target.copy_(value.view(target.shape))


def checkpoint_tensors(session: Session, every_part: bool) -> tensor_files.Tensors:
    """The tensors of a checkpoint: this rank's parts, or all parts (to load whole tables); the offset is rank 0's."""
    tensors: tensor_files.Tensors = {}
    for name, table in _tables(session):
        for part in _parts(session, table, every_part):
            for block, tensor in _blocks(table.part(part)).items():
                if tensor.numel():
                    tensors[f"{name}.part-{part:05d}.{block}"] = tensor.detach()
    if session.model.offset is not None:
        tensors["offset"] = session.model.offset.data
        tensors |= {f"offset.state{k}": state for k, state in enumerate(session.offset_state)}
    return tensors


def _tables(session: Session) -> tuple[tuple[str, Table], tuple[str, Table]]:
    return ("user", session.model.user), ("item", session.model.item)


def _parts(session: Session, table: Table, every_part: bool) -> range:
    return range(len(table.layout.parts)) if every_part else table.layout.parts_of(session.world.rank)


def _blocks(rows: Rows) -> tensor_files.Tensors:
    """The rows as contiguous float32 tensors (rows, columns): one where they are packed, else one a tensor."""
    weight = rows.weight.detach()
    if weight.stride(0) > weight.shape[1]:
        stride = weight.stride(0)
        return {"rows": weight.as_strided((len(weight), stride), (stride, 1))}
    found = {key: tensor.detach().view(torch.float32) for key, tensor in rows.tensors().items()}
    return {key: tensor if tensor.ndim == 2 else tensor[:, None] for key, tensor in found.items()}


def _columns(table: Table) -> Columns:
    """How a table's rows lie in the blocks that a checkpoint stores."""
    rows = table.rows
    widths = {key: tensor[0:1].numel() for key, tensor in rows.tensors().items()}
    if rows.weight.stride(0) <= rows.weight.shape[1]:
        return {key: {key: (0, width)} for key, width in widths.items()}
    firsts = {key: int(tensor.storage_offset()) for key, tensor in rows.tensors().items()}
    return {"rows": {key: (first, first + widths[key]) for key, first in firsts.items()}}


def save(session: Session) -> None:
    """Begin a checkpoint of this step; it is committed in the background, see :func:`follow_background_save`."""
    progress, config, world = session.progress, session.config, session.world
    if session.saved_step == progress.step:
        return
    began = time.monotonic()
    progress.wall_seconds += began - session.started
    session.started = began
    state = {
        "loader": session.loader.state(progress.epoch, progress.step_in_epoch),
        "progress": vars(progress),
        "config": to_dict(config),
        "columns": {name: _columns(table) for name, table in _tables(session)},
        "world_size": world.size,
    }
    tensors = checkpoint_tensors(session, every_part=False)
    if not world.is_main:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("offset")}
    chosen = (chosen_epoch(progress) + 1) * session.loader.num_steps if progress.epochs else None
    _record(session, session.saver.begin(progress.step, tensors, state, chosen))
    session.saved_step, session.saved_at = progress.step, time.monotonic()


def follow_background_save(session: Session, busy: float, failed: float) -> None:
    """Go on with the checkpoint in flight, given the maximum of the ranks' ``saver.flags()``."""
    _record(session, session.saver.advance(busy, failed))
    if session.saver.unprepared and _is_near(session):
        tensors = checkpoint_tensors(session, every_part=False)
        if sum(tensor.nbytes for tensor in tensors.values()) < available_bytes() // 4:
            session.saver.prepare(tensors)


def _is_near(session: Session) -> bool:
    """Whether half of the way to the next checkpoint is gone: a short run never makes pages for one."""
    cadence = session.config.checkpoint_every
    return not cadence.endswith("m") or time.monotonic() - session.saved_at > 30 * int(cadence[:-1])


def wait_for_save(session: Session) -> None:
    """Return when the checkpoint in flight, if there is one, is committed."""
    _record(session, session.saver.wait())


def _record(session: Session, done: dict[str, Any] | None) -> None:
    if done is None:
        return
    if warning := done.pop("warning", None):
        session.console.warn(warning)
    session.metrics.write("checkpoint", epoch=session.progress.shown_epoch, **done)
    session.metrics.publish()


def chosen_epoch(progress: Progress) -> int:
    """The epoch that ``final`` reports: the last one, or the best on the stop rows."""
    return int(np.argmin(progress.stop_rmse)) if progress.stop_rmse else len(progress.epochs) - 1

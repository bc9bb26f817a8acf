"""What a training says before its first step, and after its last: plain words on the console."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch

from mfdist import storage
from mfdist.model.cpu_step import FusedStep
from mfdist.results.ranking_metrics import HEADLINE, figures_in_words
from mfdist.results.report import current_rss
from mfdist.training.session import Session

SHORT_BATCH = 1 / 16
"""A last batch with less than this of the others' ratings is warned of where the loss is a mean under sgd."""


def announce(session: Session) -> None:
    """What will happen; collective. A resume point was said when it was taken."""
    config, world, manifest = session.config, session.world, session.dataset.manifest
    session.console.info(
        f"data:    {manifest.name}, {session.loader.num_rows:,} training and {manifest.num_ratings['val']:,} "
        f"validation ratings, {manifest.num_users:,} users, {manifest.num_items:,} items"
    )
    session.console.info(f"model:   {_model(session)}")
    how = "users and items solved in turn" if config.is_ranking else (
        f"{config.optimizer} with a rate of {config.lr:g} ({config.lr_schedule})")  # fmt: skip
    session.console.info(
        f"steps:   {session.loader.num_steps:,} an epoch of {config.batch_size:,} ratings each, {config.epochs} "
        f"{'epoch' if config.epochs == 1 else 'epochs'}, {how}"
    )
    used = world.max([float(current_rss())])[0]
    session.console.info(f"machine: {_machine(session)}; {used / 2**30:.2f} GiB a process so far")
    session.console.info(
        f"run:     {storage.redact(session.run)}, a checkpoint every {_cadence(config.checkpoint_every)}; Ctrl-C or "
        "SIGTERM stops with one, and the same command goes on"
    )
    last = session.loader.num_rows % config.batch_size
    if config.optimizer == "sgd" and config.reduction == "mean" and 0 < last < config.batch_size * SHORT_BATCH:
        session.console.warn(
            f"the last batch of an epoch has {last:,} ratings, and --reduction mean gives each of them the weight of "
            f"{config.batch_size // last:,} elsewhere: leave --batch-size out, or give another one."
        )
    if isinstance(session.fused, FusedStep) and session.fused.warning:
        session.console.warn(session.fused.warning)


def epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """The line of an epoch, from its record in ``metrics.jsonl``."""
    parts = [f"epoch {record['epoch']}/{epochs}", f"train rmse {record['train_rmse']:.4f}"]
    if record["val_rmse_clipped"] is not None:
        parts.append(f"val rmse {record['val_rmse_clipped']:.4f} mae {record['val_mae_clipped']:.4f} (clipped)")
    if HEADLINE in record:
        parts[1] = f"rmse of the choices (1 each) {record['train_rmse']:.4f}"
        parts.append(figures_in_words(record))
    if record["stop_rmse"] is not None:
        parts.append(f"stop rows {record['stop_rmse']:.4f}")
    parts.append(f"{record['seconds']:.1f} s + {record['validation_seconds']:.1f} s to validate")
    return " | ".join([*parts, f"{record['ratings_per_second'] / 1e6:.3f} M ratings/s"])


def next_commands(run: str, errors: bool = True) -> list[str]:
    """What somebody types after a training, to look at the result and to use it; paths as they were given.

    ``errors``: the model predicts ratings, so that there is a page of its errors.
    """
    given = shlex.quote(storage.redact(run))
    return [f"{_program('evaluate')} {given}{' --html comparison.html' if errors else ''}",
            f"{_program('recommend')} --run-dir {given} --out recommendations.parquet"]  # fmt: skip


def _program(job: str) -> str:
    """How this installation starts a job: as the one that runs was started, from a checkout or by the program."""
    started = sys.argv[0]
    return f"python {os.path.join(os.path.dirname(started), job)}.py" if started.endswith(".py") else f"mfdist {job}"


def _model(session: Session) -> str:
    form, manifest = session.model.form, session.dataset.manifest
    count = (manifest.num_users + manifest.num_items) * form.width
    count += session.model.offset is not None
    parts = [f"{form.dim} factors"]
    if form.members > 1:
        parts[0] += f" in {form.members} groups"
    parts += ["biases"] if form.bias else []
    parts += [f"a sigmoid onto {form.sigmoid_range[0]:g} to {form.sigmoid_range[1]:g}"] if form.sigmoid_range else []
    parts += ["what a user rated counts beside how"] if form.implicit else []
    return f"{form.model}: {', '.join(parts)}; {count:,} numbers to learn"


def _machine(session: Session) -> str:
    world, config = session.world, session.config
    who = f"{world.size} {'process' if world.size == 1 else 'processes'} on {_device(session)}"
    if config.sharding == "replicated":
        return f"{who}; the whole tables in each, by torch's own autograd"
    if not session.fused:
        return f"{who}; tables cut by rows, by torch's own autograd"
    if world.size == 1:
        return who
    return f"{who}; tables cut by rows, item rows go through {session.fused.transport}"


def _device(session: Session) -> str:
    if session.world.device.type == "cuda":
        return torch.cuda.get_device_name(session.world.device)
    threads = torch.get_num_threads()
    return f"the CPU, {threads} {'thread' if threads == 1 else 'threads'} each"


def _cadence(text: str) -> str:
    if text == "epoch":
        return text
    return f"{text[:-1]} minutes" if text.endswith("m") else f"{text} steps"

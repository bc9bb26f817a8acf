"""The checkpoints of a run, looked after by hand: ``ls``, ``verify`` and ``prune``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mfdist import storage
from mfdist.config import flag, positional
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.run import checkpoint
from mfdist.run.about import read_about
from mfdist.run.checkpoint import Retention
from mfdist.run.lease import Lease

ACTIONS = ("ls", "verify", "prune")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HousekeepingConfig:
    """The flags of jobs/checkpoint.py."""

    action_and_run: tuple[str, ...] = positional("ls, verify or prune, and the run directory or URL")
    keep: int | None = flag(None, "prune: how many of the newest to keep; not set: as the run was started", at_least=1)
    keep_every: int | None = flag(
        None, "prune: keep also every checkpoint whose step is a multiple of this; not set: as the run", at_least=1
    )

    def __post_init__(self) -> None:
        if len(self.action_and_run) != 2 or self.action_and_run[0] not in ACTIONS:
            raise UsageError("expected one of ls, verify, prune, and one run directory: checkpoint.py ls runs/advanced")
        if self.action_and_run[0] != "prune" and (self.keep or self.keep_every):
            raise UsageError("--keep and --keep-every belong to prune.")


def manage_checkpoints(config: HousekeepingConfig, say: Say) -> None:
    """Do what the flags ask, saying it line by line. DataError (3) where a checkpoint is damaged, or there is none."""
    action, run = config.action_and_run
    if not storage.exists(storage.join(run, "run.json")):
        raise DataError(f"{storage.redact(run)} holds no run of mfdist.")
    {"ls": _list, "verify": _verify, "prune": _prune}[action](config, run, say)


def _list(config: HousekeepingConfig, run: str, say: Say) -> None:
    """A line a folder, those without COMMIT too: they do not count, and the run removes them."""
    committed = set(checkpoint.committed_steps(run))
    say(f"{'step':>10}  {'written (UTC)':19}  {'ranks':>5}  {'files':>5}  {'bytes':>15}")
    for step in checkpoint.all_steps(run):
        if step not in committed:
            say(f"{step:>10}  no COMMIT: not complete, does not count")
            continue
        try:
            about = checkpoint.read_commit(checkpoint.folder_of(run, step))
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(about.time))
            size = sum(one.bytes for one in about.files.values())
            say(f"{step:>10}  {when}  {about.world_size:>5}  {len(about.files):>5}  {size:>15,}")
        except (DataError, ValueError, OverflowError, OSError):  # no COMMIT, or a time that no clock shows
            say(f"{step:>10}  its COMMIT cannot be read")


def _verify(config: HousekeepingConfig, run: str, say: Say) -> None:
    steps = checkpoint.committed_steps(run)
    if not steps:
        raise DataError(f"{storage.redact(run)} has no checkpoint.")
    damaged = 0
    whole = sum(_bytes_of(run, step) for step in steps)
    with Console(aside=True).progress("verify", whole, unit="bytes") as progress:
        for step in steps:
            faults = checkpoint.verify(checkpoint.folder_of(run, step), progress.advance)
            damaged += bool(faults)
            say(f"{step:>10}  {'; '.join(faults) if faults else 'intact'}")
    if damaged:
        raise DataError(
            f"{damaged} of {len(steps)} checkpoints of {storage.redact(run)} are damaged; a run passes over them."
        )


def _bytes_of(run: str, step: int) -> int:
    """Of a checkpoint's files; 0 where its COMMIT cannot be read, which :func:`checkpoint.verify` will say."""
    try:
        return sum(one.bytes for one in checkpoint.read_commit(checkpoint.folder_of(run, step)).files.values())
    except (OSError, DataError):
        return 0


def _prune(config: HousekeepingConfig, run: str, say: Say) -> None:
    """By the run's own rule where no flag says otherwise; the epoch that the stop rows chose stays in any case."""
    stored = read_about(run).config
    last = config.keep if config.keep is not None else _count(stored.get("keep")) or 3
    every = config.keep_every if config.keep_every is not None else _count(stored.get("keep_every"))
    with Lease(run, say):
        gone = checkpoint.prune(run, Retention(last, every), _chosen(run))
        storage.remove(checkpoint.spare_of(run))
    say(f"removed {len(gone)}, kept {len(checkpoint.committed_steps(run))}")


def _count(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def _chosen(run: str) -> int | None:
    """The step of the epoch that the stop rows have chosen so far, from the newest readable checkpoint."""
    for step in reversed(checkpoint.committed_steps(run)):
        try:
            state = checkpoint.read_state(checkpoint.folder_of(run, step))
            errors, epochs = state["progress"]["stop_rmse"], state["progress"]["epoch"]
            per_epoch = (state["progress"]["step"] - state["progress"]["step_in_epoch"]) // max(epochs, 1)
            return int((errors.index(min(errors)) + 1) * per_epoch) if errors else None
        except (OSError, DataError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None

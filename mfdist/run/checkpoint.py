"""Checkpoints: a folder that exists when its COMMIT does, loadable on any number of ranks.

    RUN/checkpoints/step-00012000/   __R_0.distcp   tensors that rank R held (see ``shards``)
                                     .metadata      which tensor lies where, as torch.distributed.checkpoint has it
                                     state.json     order state, metrics so far, configuration
                                     COMMIT         written last: files with bytes and BLAKE2b
    RUN/checkpoints/spare/           tensor files of a pruned checkpoint, which the next one overwrites: faster than
                                     new files, and its room is there; local runs only, removed at the end

Tables are stored one tensor a part (``user.part-00017.rows``), never as one sharded tensor: parts are uneven, and
a part is the unit that ranks own, so that 4 ranks' checkpoint loads on 1, 3 or 7 with no rank holding a whole table.
Nothing here is collective but :func:`newest_good`; ``saver`` brings the ranks together.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mfdist import json_tables, storage
from mfdist.cluster.world import World
from mfdist.data.dataset import checksum
from mfdist.errors import DataError
from mfdist.run import tensor_files

COMMIT, STATE = "COMMIT", "state.json"
REMEDY = "remove this checkpoint, and the run goes on from the one before it"
Entries = dict[str, dict[str, Any]]
"""File name -> {"bytes", "checksum"}."""


def folder_of(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def all_steps(run: str) -> list[int]:
    """Steps of all checkpoint folders, ascending, also of those that a crash left without COMMIT."""
    names = storage.list_names(storage.join(run, "checkpoints"))
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


def committed_steps(run: str) -> list[int]:
    """Steps of the checkpoints that exist, ascending."""
    return [step for step in all_steps(run) if storage.exists(storage.join(folder_of(run, step), COMMIT))]


def commit(
    folder: str, step: int, places: Sequence[tensor_files.Place], entries: Entries, state: str, world_size: int
) -> int:
    """Complete a folder whose tensor files stand on the storage; rank 0 calls. Returns the bytes of the whole.

    ``state``: the JSON text that :func:`read_state` gives back.
    """
    tensor_files.write_metadata(storage.join(folder, tensor_files.METADATA), places)
    storage.write_text(storage.join(folder, STATE), state)
    files = {**entries, **{name: entry(storage.join(folder, name)) for name in (tensor_files.METADATA, STATE)}}
    sync_folder(folder)
    about = {"step": step, "time": time.time(), "world_size": world_size, "files": files}
    storage.write_text(storage.join(folder, COMMIT), json.dumps(about, indent=1))
    sync_folder(folder)
    return sum(one["bytes"] for one in files.values())


def entry(path: str) -> dict[str, Any]:
    return {"bytes": storage.size(path), "checksum": checksum(path)}


def sync_folder(folder: str) -> None:
    """Bring the names in a local folder to the disk."""
    if storage.is_local(folder):
        number = os.open(storage.local_path(folder), os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the ``last`` newest, and those whose step is a multiple of ``every``."""

    last: int
    every: int | None = None


def spare_of(run: str) -> str:
    return storage.join(run, "checkpoints", "spare")


def prune(run: str, retention: Retention, chosen: int | None) -> list[int]:
    """Remove all but the checkpoints that ``retention`` names and the ``chosen`` step, and what crashes left behind.

    Only the holder of the run directory calls. Returns the steps that were removed. A folder loses its COMMIT first,
    so that a crash in between leaves no half checkpoint that counts. Local: the last one becomes the spare folder.
    """
    committed = committed_steps(run)
    newest = committed[-1] if committed else -1
    kept = set(committed[-retention.last :]) | {chosen}
    if retention.every:
        kept |= {step for step in committed if step % retention.every == 0}
    gone = [step for step in all_steps(run) if step < newest and step not in kept]
    for step in gone:
        folder = folder_of(run, step)
        storage.remove(storage.join(folder, COMMIT))
        if storage.is_local(run) and step == gone[-1]:
            storage.remove(spare_of(run))
            os.rename(storage.local_path(folder), storage.local_path(spare_of(run)))
        else:
            storage.remove(folder)
    return gone


def newest_good(run: str, world: World, warn: Any) -> int | None:
    """The newest checkpoint whose files are what its COMMIT says; damaged ones are named and passed over.

    Every rank calls; rank 0 reads.
    """
    found: int | Exception | None = None
    if world.is_main:
        try:
            for step in reversed(committed_steps(run)):
                faults = verify(folder_of(run, step))
                if not faults:
                    found = step
                    break
                warn(f"checkpoint {storage.redact(folder_of(run, step))} is damaged ({faults[0]}) and is passed over")
        except Exception as error:
            found = error
    agreed: Any = world.broadcast(found)
    if isinstance(agreed, Exception):
        raise agreed
    return agreed  # type: ignore[no-any-return]


def verify(folder: str, advance: Callable[[int], None] = lambda _bytes: None) -> list[str]:
    """What is wrong with a committed checkpoint, a sentence a file; empty where all is well. ``advance`` is told the
    bytes of each file behind it."""
    try:
        files = read_commit(folder).files
    except (OSError, DataError) as error:
        return [f"COMMIT cannot be read: {error}"]
    faults = [f"{name} is not in COMMIT" for name in (tensor_files.METADATA, STATE) if name not in files]
    for name, entry in files.items():
        try:
            path = storage.inside(folder, name)
            if not storage.exists(path):
                faults.append(f"{name} is missing")
            elif storage.size(path) != entry.bytes:
                faults.append(f"{name} has {storage.size(path)} bytes instead of {entry.bytes}")
            elif checksum(path) != entry.checksum:
                faults.append(f"{name} has another checksum")
            advance(entry.bytes)
        except DataError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror or type(error).__name__}")
    return faults


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Commit:
    """What COMMIT says."""

    step: int
    time: float
    world_size: int
    files: dict[str, Entry]


def read_commit(folder: str) -> Commit:
    """DataError where it cannot be one."""
    path = storage.inside(folder, COMMIT)
    try:
        found: Commit = json_tables.typed(Commit, json_tables.read(path, REMEDY), "")
    except ValueError as error:
        raise json_tables.damaged(path, error, REMEDY) from None
    return found


def read_state(folder: str) -> dict[str, Any]:
    """The JSON part of a checkpoint; DataError where ``folder`` is no committed checkpoint."""
    if not storage.exists(storage.join(folder, COMMIT)):
        raise DataError(f"{storage.redact(folder)} is no checkpoint: it has no {COMMIT}.")
    path = storage.inside(folder, STATE)
    try:
        return json_tables.read(path, REMEDY)
    except FileNotFoundError:
        raise DataError(f"{storage.redact(path)} is missing; {REMEDY}.") from None

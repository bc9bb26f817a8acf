"""Checkpoints: a folder that exists when its COMMIT does, loadable on any number of ranks.

    RUN/checkpoints/step-00012000/   __R_K.distcp   tensors, by torch.distributed.checkpoint
                                     .metadata      which tensor lies where
                                     state.json     order state, metrics so far, configuration
                                     COMMIT         written last: files with bytes and BLAKE2b

Tables are stored one tensor a part (``user.part-00017.weight``), never as one sharded tensor: parts are uneven, and
a part is the unit that ranks own, so that 4 ranks' checkpoint loads on 1, 3 or 7 with no rank holding a whole table.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from mfdist import storage
from mfdist.dataset import checksum
from mfdist.distributed import World
from mfdist.errors import DataError, MfdistError

COMMIT, STATE = "COMMIT", "state.json"
Tensors = dict[str, torch.Tensor]


def folder_of(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:08d}")


def committed_steps(run: str) -> list[int]:
    """Steps of the checkpoints that exist, ascending."""
    names = storage.list_names(storage.join(run, "checkpoints"))
    steps = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()]
    return sorted(step for step in steps if storage.exists(storage.join(folder_of(run, step), COMMIT)))


def save(run: str, step: int, tensors: Tensors, state: dict[str, Any], world: World) -> int:
    """Write and commit a checkpoint; every rank calls with its own ``tensors``. Returns the bytes written by all.

    MfdistError (exit code 1) where the storage refuses; the checkpoints before stay as they are.
    """
    folder = folder_of(run, step)
    failure = None
    if world.is_main:
        storage.remove(folder)  # what a crash may have left, without COMMIT
        storage.make_dirs(folder)
    world.barrier()
    try:
        with torch.no_grad(), _alone_is_fine():
            dcp.save(dict(tensors), storage_writer=_writer(folder), no_dist=not dist.is_initialized())
        files = _own_files(folder, world)
    except Exception as error:  # whatever a filesystem or torch raises, on any rank, ends in one sentence
        failure, files = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}", {}
    failures = [text for text in world.gather(failure) if text]
    if failures:
        raise MfdistError(
            f"the checkpoint {storage.redact(folder)} could not be written ({failures[0]}). "
            "Older checkpoints are intact; make room or choose another --run."
        )
    listed = {name: entry for part in world.gather(files) for name, entry in part.items()}
    if world.is_main:
        text = json.dumps(state)
        storage.write_text(storage.join(folder, STATE), text)
        listed[STATE] = _entry(folder, STATE)
        storage.write_text(storage.join(folder, COMMIT), json.dumps({"step": step, "files": listed}, indent=1))
    world.barrier()
    return sum(entry["bytes"] for entry in listed.values())


def prune(run: str, keep: int, chosen: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints and the ``chosen`` step; rank 0 calls."""
    for step in committed_steps(run)[:-keep]:
        if step != chosen:
            storage.remove(storage.join(folder_of(run, step), COMMIT))
            storage.remove(folder_of(run, step))


def newest_good(run: str, world: World, warn: Any) -> int | None:
    """The newest checkpoint whose files are what its COMMIT says; damaged ones are named and passed over.

    Every rank calls; rank 0 reads.
    """
    found = None
    if world.is_main:
        for step in reversed(committed_steps(run)):
            faults = verify(folder_of(run, step))
            if not faults:
                found = step
                break
            warn(f"checkpoint {storage.redact(folder_of(run, step))} is damaged ({faults[0]}) and is passed over")
    return world.broadcast(found)


def verify(folder: str) -> list[str]:
    """What is wrong with a committed checkpoint, a sentence a file; empty where all is well."""
    try:
        files = json.loads(storage.read_text(storage.join(folder, COMMIT)))["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"COMMIT cannot be read: {error}"]
    faults = []
    for name, entry in files.items():
        path = storage.join(folder, name)
        if not storage.exists(path):
            faults.append(f"{name} is missing")
        elif storage.size(path) != entry["bytes"]:
            faults.append(f"{name} has {storage.size(path)} bytes instead of {entry['bytes']}")
        elif checksum(path) != entry["checksum"]:
            faults.append(f"{name} has another checksum")
    return faults


def read_state(folder: str) -> dict[str, Any]:
    """The JSON part of a checkpoint; DataError where ``folder`` is no committed checkpoint."""
    if not storage.exists(storage.join(folder, COMMIT)):
        raise DataError(f"{storage.redact(folder)} is no checkpoint: it has no {COMMIT}.")
    state: dict[str, Any] = json.loads(storage.read_text(storage.join(folder, STATE)))
    return state


def load(folder: str, tensors: Tensors) -> None:
    """Fill ``tensors`` in place from a checkpoint of any world size; every rank calls."""
    reader = FsspecReader(folder) if not storage.is_local(folder) else dcp.FileSystemReader(storage.local_path(folder))
    targets = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    with torch.no_grad(), _alone_is_fine():
        dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns where there is no process group, though it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _writer(folder: str) -> Any:
    if storage.is_local(folder):
        return dcp.FileSystemWriter(storage.local_path(folder))
    return FsspecWriter(folder, sync_files=False)


def _own_files(folder: str, world: World) -> dict[str, dict[str, Any]]:
    """Entries of the files that this rank wrote (rank 0: the metadata too)."""
    world.barrier()
    own = [name for name in storage.list_names(folder) if name.startswith(f"__{world.rank}_")]
    return {name: _entry(folder, name) for name in own + ([".metadata"] if world.is_main else [])}


def _entry(folder: str, name: str) -> dict[str, Any]:
    path = storage.join(folder, name)
    return {"bytes": storage.size(path), "checksum": checksum(path)}

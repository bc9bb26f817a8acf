"""Checkpoints written beside the training: a short pause, then a thread a rank, COMMIT last.

    pause        every rank writes its tensors to the page cache, straight from the tables
    background   every rank flushes its files, reads them back for their checksums (to a URL: uploads them)
    background   once all ranks are done, rank 0 writes .metadata, state.json and COMMIT, and prunes
    before it    where no older checkpoint's files can be overwritten, a thread makes pages for the next one's

A step of the training touches rows of every part, so that a snapshot taken while it goes on would have to hold a copy
of nearly all rows within a second. Writing to the page cache is such a copy that needs no memory of the process: the
kernel bounds it, and takes it back once it is on the disk. A run on an object store writes to a local temporary
folder (``TMPDIR``) and uploads from there.

The background needs no collective. The ranks meet in the checks that the training makes anyway
(:meth:`Saver.flags`, :meth:`Saver.advance`), so that no collective of a save comes between two of the training, and a
failure on any rank is raised on all of them, as the same sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.errors import MfdistError
from mfdist.run import checkpoint, tensor_files
from mfdist.run.checkpoint import Entries, Retention

COPY_BYTES = 1 << 23
PAGES_BYTES = 1 << 22
MOST_FILES = 4
"""Of a rank in a checkpoint: as many as it has threads, up to this."""
DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
"""Filesystems on which reading a hole makes a page and moves nothing."""


@dataclass
class _Save:
    """A checkpoint in flight, as one rank sees it. ``pause_seconds`` is the slowest rank's."""

    step: int
    state: str
    chosen: int | None
    folder: str
    began: float
    pause_seconds: float = 0.0
    places: list[tensor_files.Place] = field(default_factory=list)
    entries: Entries = field(default_factory=dict)
    committing: bool = False
    written: int = 0
    failure: str | None = None
    warning: str | None = None
    thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """The checkpoints of one run, one at a time. Methods marked collective: every rank calls, at the same place.

    ``may_commit`` is called on rank 0 before COMMIT is written; it raises where the run is no longer this job's.
    """

    def __init__(
        self, run: str, world: World, retention: Retention, may_commit: Callable[[], None] | None = None
    ) -> None:
        self._run, self._world, self._retention = run, world, retention
        self._may_commit = may_commit or (lambda: None)
        self._save: _Save | None = None
        self._staging: str | None = None
        self._files = min(MOST_FILES, torch.get_num_threads())
        self._making: threading.Thread | None = None
        self._enough = threading.Event()
        self._on_disk = storage.is_local(run) and _on_a_disk_here(run)

    @property
    def unprepared(self) -> bool:
        """Whether :meth:`prepare` would do something: no checkpoint in flight, the run on a disk of this host."""
        return not self._save and not self._making and self._on_disk

    def prepare(self, tensors: tensor_files.Tensors) -> None:
        """See to it that the next checkpoint of these ``tensors`` finds files to overwrite, by a thread; each rank by
        itself, once between two checkpoints (:attr:`unprepared`)."""
        folder = storage.local_path(checkpoint.spare_of(self._run))
        room = tensor_files.room_of(self._world.rank, tensors, self._files)
        missing = {name: size for name, size in room.items() if not os.path.exists(os.path.join(folder, name))}

        def make() -> None:
            with contextlib.suppress(OSError):  # the checkpoint itself will say what is wrong
                os.makedirs(folder, exist_ok=True)
                for name, size in missing.items():
                    _make_pages(os.path.join(folder, name), size, self._enough)

        self._enough.clear()
        self._making = threading.Thread(target=make, name="checkpoint-pages", daemon=True)
        self._making.start()

    def begin(
        self, step: int, tensors: tensor_files.Tensors, state: dict[str, Any], chosen: int | None
    ) -> dict[str, Any] | None:
        """Take a snapshot of this rank's ``tensors``; they may change once this returns. Collective.

        An earlier checkpoint in flight is waited for; returns what :meth:`wait` does. MfdistError where the folder
        cannot be made; what fails later is raised by :meth:`advance` or :meth:`wait`.
        """
        began = time.monotonic()
        earlier = self.wait()
        self._save = save = _Save(step, json.dumps(state), chosen, checkpoint.folder_of(self._run, step), began)
        if self._world.is_main:
            with _noting(save):
                storage.remove(save.folder)  # what a crash may have left, without COMMIT
                storage.make_dirs(save.folder)
        if self._world.any(save.failure is not None):
            self._raise_failure()
        with _noting(save):
            local = self._local_folder(save.folder, tensor_files.room_of(self._world.rank, tensors, self._files))
            save.places = tensor_files.write(local, self._world.rank, tensors, self._files)
            self._start(save, lambda: self._finish_files(save, local))
        save.pause_seconds = float(self._world.max([time.monotonic() - began])[0])
        return earlier

    def flags(self) -> list[float]:
        """[this rank is still at work, something failed here], for the ranks to take the maximum of."""
        save = self._save
        return [float(save.busy), float(save.failure is not None)] if save else [0.0, 0.0]

    def advance(self, busy: float, failed: float) -> dict[str, Any] | None:
        """Go on where all ranks can, given the maximum of their flags. Collective.

        Returns step, pause_seconds, background_seconds and bytes of a checkpoint that is now committed (and
        ``warning`` where old ones could not be removed), else None. MfdistError on all ranks where any failed.
        """
        save = self._save
        if save is None or busy:
            return None
        if failed:
            self._raise_failure()
        if not save.committing:
            save.committing = True
            parts = self._world.gather((save.places, save.entries))
            if self._world.is_main:
                places = [place for part, _ in parts for place in part]
                entries = {name: entry for _, part in parts for name, entry in part.items()}
                self._start(save, lambda: self._commit(save, places, entries))
            return None
        self._save = None
        done = {"step": save.step, "pause_seconds": save.pause_seconds, "bytes": save.written,
                "background_seconds": time.monotonic() - save.began - save.pause_seconds}  # fmt: skip
        return {**done, "warning": save.warning} if save.warning else done

    def wait(self) -> dict[str, Any] | None:
        """Wait for the checkpoint in flight, if there is one, and return what :meth:`advance` does. Collective."""
        self._stop_making()
        done = None
        while self._save is not None and done is None:
            if self._save.thread:
                self._save.thread.join()
            done = self.advance(*self._world.max(self.flags()).tolist())
        return done

    def close(self) -> None:
        """Let this rank's threads end; for every way out. What is not committed by then never existed."""
        self._stop_making()
        if self._save and self._save.thread:
            self._save.thread.join()
        self._save = None
        if self._staging:
            shutil.rmtree(self._staging, ignore_errors=True)

    # Inside ----------------------------------------------------------------------------------------

    def _local_folder(self, folder: str, files: Iterable[str]) -> str:
        """Where this rank writes: ``folder``, with the spare ``files`` in it, or a temporary one to upload from."""
        if not storage.is_local(folder):
            self._staging = self._staging or tempfile.mkdtemp("-mfdist")
            return self._staging
        for name in files:
            spare = os.path.join(storage.local_path(checkpoint.spare_of(self._run)), name)
            if os.path.exists(spare):
                os.rename(spare, os.path.join(storage.local_path(folder), name))
        return storage.local_path(folder)

    def _stop_making(self) -> None:
        if self._making:
            self._enough.set()
            self._making.join()
            self._making = None

    def _start(self, save: _Save, work: Callable[[], None]) -> None:
        def guarded() -> None:
            with _noting(save):
                work()

        save.thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        save.thread.start()

    def _finish_files(self, save: _Save, local: str) -> None:
        """Bring this rank's files to where they stay, and note their bytes and checksums."""
        for name in sorted({place.file for place in save.places}):
            path = os.path.join(local, name)
            _flush(path)
            save.entries[name] = checkpoint.entry(path)
            if not storage.is_local(save.folder):
                _upload(path, storage.join(save.folder, name), save.entries[name]["bytes"])

    def _commit(self, save: _Save, places: list[tensor_files.Place], entries: Entries) -> None:
        self._may_commit()
        save.written = checkpoint.commit(save.folder, save.step, places, entries, save.state, self._world.size)
        try:
            checkpoint.prune(self._run, self._retention, save.chosen)
        except Exception as error:  # the new checkpoint stands: old ones that stay cost room, no result
            save.warning = f"old checkpoints could not be removed ({_said(error)})"

    def _raise_failure(self) -> None:
        """End the save on all ranks with the first rank's reason, and make room."""
        save = self._save
        assert save is not None
        self._save = None
        reason = next(text for text in self._world.gather(save.failure) if text)
        if self._world.is_main:
            with contextlib.suppress(Exception):
                storage.remove(save.folder)
        raise MfdistError(
            f"the checkpoint {storage.redact(save.folder)} could not be written ({reason}). "
            "Older checkpoints are intact; make room or choose another --run-dir."
        )


@contextlib.contextmanager
def _noting(save: _Save) -> Iterator[None]:
    """Whatever a filesystem raises is noted, for all ranks to hear at their next check."""
    try:
        yield
    except Exception as error:
        save.failure = _said(error)


def _said(error: Exception) -> str:
    if isinstance(error, MfdistError):
        return str(error)
    text = str(error).strip() or type(error).__name__
    return storage.redact(f"{type(error).__name__}: {text.splitlines()[0][:300]}")


def _make_pages(path: str, size: int, enough: threading.Event) -> None:
    """Make a file of zeros without blocks on the disk, and read it: overwriting it needs no new pages then."""
    with open(path, "wb+", buffering=0) as stream:
        stream.truncate(size)
        buffer = bytearray(PAGES_BYTES)
        while not enough.is_set() and stream.readinto(buffer):
            pass


def _on_a_disk_here(run: str) -> bool:
    """Whether a local path lies on one of ``DISKS``."""
    try:
        device = os.stat(storage.local_path(run)).st_dev
        with open("/proc/self/mountinfo") as stream:
            lines = [line.split() for line in stream]
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    return any(words[2] == name and words[words.index("-") + 1] in DISKS for words in lines)


def _flush(path: str) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _upload(path: str, target: str, size: int) -> None:
    with open(path, "rb") as source, storage.open_write(target) as sink:
        shutil.copyfileobj(source, sink, COPY_BYTES)
    if storage.size(target) != size:
        raise OSError(f"{storage.name_of(target)} has {storage.size(target)} bytes after its upload instead of {size}")

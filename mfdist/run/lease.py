"""Who may write into a run directory: one job at a time, by a file with a heartbeat.

``RUN/lease.json`` names the holder (host, pid and when that process began, scheduler job) and carries the time of its
last heartbeat. A newcomer takes it over at once where the holder was on this host and its process is gone, or was of
the same scheduler job. A holder on this host that lives refuses it. Else it waits, saying so: until the heartbeat is a
minute old (then the holder is gone), or until a new one comes (then it lives).

Times of two hosts are compared; clocks may differ by seconds, not by a minute. A holder that finds another's name in
the file (it was cut off for more than a minute) stops before its next checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mfdist import storage
from mfdist.errors import MfdistError

LEASE = "lease.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
SETTLE_SECONDS = 0.02
"""After writing the file a newcomer looks again: of two that came together the last writer has it."""

Holder = dict[str, Any]

_held: set[str] = set()
"""Tokens of the leases that this process holds. One that it could not remove when it ended holds nothing."""


class LeaseLost(MfdistError):
    """Another job has taken the run directory over."""


class Lease:
    """Use as a context manager, on one process of the job. ``say`` gets a line where it has to wait.

    MfdistError (exit code 1: it can be tried again) where another job holds the directory.
    """

    def __init__(self, run: str, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._path = storage.join(run, LEASE)
        self._me = identity()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self._obtain()
        _held.add(self._me["token"])
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        _held.discard(self._me["token"])
        with contextlib.suppress(Exception):  # a lease that stays is taken over by the next
            if self._is_mine(self._read()):
                storage.remove(self._path)

    def check(self) -> None:
        """LeaseLost where another job has taken over."""
        holder = self._read()
        if holder and not self._is_mine(holder):
            raise LeaseLost(
                f"{storage.redact(self._run)} was taken over by process {holder.get('pid')} on {holder.get('host')}; "
                "this job stops."
            )

    # Inside ----------------------------------------------------------------------------------------

    def _obtain(self) -> None:
        seen: Holder | None = None
        while (holder := self._read()) and not self._is_mine(holder):
            alive = is_alive(holder, self._me)
            if alive is False:
                break
            if alive or (seen is not None and holder.get("beat") != seen.get("beat")):
                raise MfdistError(
                    f"{storage.redact(self._run)} is in use by process {holder.get('pid')} on {holder.get('host')}; "
                    "stop that job, or choose another --run-dir."
                )
            left = STALE_SECONDS - (time.time() - float(holder.get("beat", 0)))
            if left <= 0:
                break
            if seen is None:
                self._say(
                    f"{storage.redact(self._run)} was last held by process {holder.get('pid')} on "
                    f"{holder.get('host')}, {STALE_SECONDS - left:.0f} s ago; waiting up to {left:.0f} s to see "
                    "whether it lives"
                )
            seen = holder
            time.sleep(min(1.0, left, BEAT_SECONDS / 4))
        try:
            self._take()
        except OSError as error:
            raise MfdistError(
                f"{storage.redact(self._run)} cannot be written ({error.strerror or type(error).__name__}); "
                "choose another --run-dir."
            ) from None

    def _take(self) -> None:
        self._write()
        time.sleep(SETTLE_SECONDS)
        self.check()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a storage that fails for a moment; a lost lease is check()'s matter
                if self._is_mine(self._read()):
                    self._write()

    def _read(self) -> Holder | None:
        """The holder; None where there is none, or its file is unreadable (it is written whole: somebody's junk)."""
        try:
            found = json.loads(storage.read_text(self._path))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self) -> None:
        storage.write_text(self._path, json.dumps({**self._me, "beat": time.time()}))

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and holder.get("token") == self._me["token"]


def identity() -> Holder:
    """This process, as others can check it."""
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid()), "boot": _text(BOOT),
        "space": _link("/proc/self/ns/pid"), "job": scheduler_job(), "token": secrets.token_hex(8),
    }  # fmt: skip


BOOT = "/proc/sys/kernel/random/boot_id"


def started(pid: int) -> str | None:
    """When a process of this host began, in the kernel's ticks; None where there is no such process (or no /proc)."""
    text = _text(f"/proc/{pid}/stat")
    fields = text.rpartition(")")[2].split() if text else []
    return None if not fields or fields[0] in "ZX" else fields[19]


def scheduler_job() -> str | None:
    """What names this job over its restarts: of Slurm, of Kubernetes' Indexed Jobs, of torchrun; None without one."""
    env = os.environ
    if job := env.get("SLURM_JOB_ID"):
        return f"slurm {env.get('SLURM_CLUSTER_NAME', '')} {job}"
    index = env.get("JOB_COMPLETION_INDEX")
    if index is not None and socket.gethostname().endswith(f"-{index}"):
        return f"kubernetes {socket.gethostname().removesuffix(f'-{index}')}"
    run = env.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else f"torchrun {run}"


def is_alive(holder: Holder, me: Holder) -> bool | None:
    """Whether the holder of a lease lives, as far as it can be seen from here (else None).

    One of this very job counts as gone, unless its process is seen to live: the scheduler has started us in its place.
    """
    here = holder.get("host") == me["host"]
    if here and holder.get("boot") != me["boot"]:
        return False  # this host has been started again
    if here and holder.get("space") == me["space"] and me["started"] is not None:
        if holder.get("pid") == me["pid"] and holder.get("token") not in _held:
            return False
        return holder.get("started") == started(int(holder.get("pid", 0)))
    return False if holder.get("job") is not None and holder.get("job") == me["job"] else None


def _text(path: str) -> str | None:
    try:
        with open(path) as stream:
            return stream.read().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None

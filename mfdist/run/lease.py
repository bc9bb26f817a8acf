"""Who may write into a run directory: one job at a time, by a file with a heartbeat.

``RUN/lease.json`` names the holder (host, pid and when that process began, scheduler job) and counts its heartbeats. A
newcomer takes it over at once where the holder was on this host and its process is gone, or was of the same scheduler
job. A holder on this host that lives refuses it. Else it waits, saying so: until a heartbeat comes (then the holder
lives), or until none has come for a minute by its own clock (then it is gone). No two clocks are compared.

The file is made only where there is none (a hard link, or the store's conditional create). Who takes over from the
token ``t`` first makes ``lease.json.after-t`` in the same way, so that of two newcomers one follows; where that one
ends before it has the lease, its own claim is followed like a lease. A holder that finds another's name in the file
(it was cut off for more than a minute) stops before its next checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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
LOOK_SECONDS = 0.5
"""Between two looks at a holder of whom nothing is known."""

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
        self._beats = 0
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
        try:
            while not self._attempt():
                pass
        except OSError as error:
            raise MfdistError(
                f"{storage.redact(self._run)} cannot be written ({error.strerror or type(error).__name__}); "
                "choose another --run-dir."
            ) from None

    def _attempt(self) -> bool:
        """Whether the lease is ours now; False where another newcomer was faster, and all has to be looked at anew."""
        holder, claims = self._read(), list[str]()
        if holder is None:
            return self._create(self._path)
        last = holder
        while True:
            if not self._wait_until_gone(last, claims[-1] if claims else self._path):
                break
            claim = f"{self._path}.after-{last['token']}"
            claims.append(claim)
            if self._create(claim):
                return self._follow(holder, claims)
            follower = self._read(claim)
            if follower is None:
                break
            last = follower
        time.sleep(storage.SETTLE_SECONDS)
        return False

    def _follow(self, holder: Holder, claims: list[str]) -> bool:
        """Take the place of a holder that is gone; only the one who made the last claim comes here."""
        found = self._read()
        mine = found is not None and found["token"] == holder["token"]
        if mine:
            self._write()
        for claim in claims if mine else claims[-1:]:
            storage.remove(claim)
        return mine

    def _wait_until_gone(self, holder: Holder, path: str) -> bool:
        """True once ``holder`` is known to be gone, False where the file at ``path`` names another by then.

        MfdistError where the holder lives.
        """
        alive = is_alive(holder, self._me)
        began, said = time.monotonic(), False
        while alive is None and time.monotonic() - began < STALE_SECONDS:
            if not said:
                self._say(
                    f"{storage.redact(self._run)} was last held by process {holder.get('pid')} on "
                    f"{holder.get('host')}; waiting up to {STALE_SECONDS:.0f} s to see whether it lives"
                )
                said = True
            time.sleep(min(LOOK_SECONDS, STALE_SECONDS / 4))
            found = self._read(path)
            if found is None or found["token"] != holder["token"]:
                return False
            alive = True if found.get("beat") != holder.get("beat") else None
        if alive:
            raise MfdistError(
                f"{storage.redact(self._run)} is in use by process {holder.get('pid')} on {holder.get('host')}; "
                "stop that job, or choose another --run-dir."
            )
        return True

    def _create(self, path: str) -> bool:
        """Make ``path`` with our name in it; False where it is there already."""
        return storage.create(path, self._text()) and (self._is_mine(self._read(path)))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a storage that fails for a moment; a lost lease is check()'s matter
                if self._is_mine(self._read()):
                    self._write()

    def _read(self, path: str | None = None) -> Holder | None:
        """The holder; None where there is none. Of an unreadable file (it is written whole: somebody's junk) one that
        is gone, with a token of its own."""
        try:
            content = storage.read_bytes(path or self._path)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not _is_well_formed(found):
            return {"token": hashlib.blake2b(content, digest_size=8).hexdigest(), "junk": True}
        return found

    def _write(self) -> None:
        storage.write_text(self._path, self._text())

    def _text(self) -> str:
        self._beats += 1
        return json.dumps({**self._me, "beat": self._beats, "time": time.time()})

    def _is_mine(self, holder: Holder | None) -> bool:
        return holder is not None and holder.get("token") == self._me["token"]


def _is_well_formed(found: Holder) -> bool:
    """Whether what stands in a lease can be one: strangers write there, too."""
    token, pid = found.get("token"), found.get("pid", 0)
    return isinstance(token, str) and re.fullmatch(r"[0-9A-Za-z]{1,64}", token) is not None and type(pid) is int


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
    if holder.get("junk"):
        return False
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

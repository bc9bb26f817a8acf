"""jobs/train.py with one fault planted from outside: MFDIST_TEST_FAULT="POINT RANK COUNT FOLDER".

The process of RANK kills itself the COUNTth time that it comes to POINT, and leaves the file FOLDER/fault; "hang" stops
it instead, and "cut" shuts its connections for data. With MFDIST_TEST_WAY=sockets ranks behave as if each had a host of
its own, and small buffers cut messages into pieces. Nothing of this is in the product: functions are replaced here.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jobs import train as job
from mfdist import process
from mfdist.cluster import connecting, shared_memory, transport
from mfdist.kernels import sockets, wire
from mfdist.model import exchange, exchange_between_hosts, optimizers
from mfdist.run import background_save, checkpoint, tensor_files
from mfdist.training import train, validation

POINTS = {
    "first step": (train, "train_step"),  # COUNT 1
    "step": (train, "train_step"),
    "mid-step": (optimizers.RowOptimizer, "update"),  # the offset's: the tables have moved, it has not
    "exchange": (exchange.SharedExchange, "bring"),
    "in rows": (exchange_between_hosts.HostExchange, "_wait"),  # some of the message is here or gone, some is not
    "in gradients": (exchange_between_hosts.HostExchange, "_wait"),
    "hang": (exchange_between_hosts.HostExchange, "run"),
    "cut": (exchange_between_hosts.HostExchange, "run"),
    "check": (train, "_check"),
    "before shard": (tensor_files, "write"),
    "in shard": (tensor_files, "_exact"),
    "flush": (background_save, "_flush"),
    "before metadata": (tensor_files, "write_metadata"),
    "before COMMIT": (checkpoint, "sync_folder"),
    "prune": (checkpoint, "spare_of"),  # COMMIT is gone, its folder is not
    "evaluation": (validation.Validation, "errors"),
    "export": (train, "finish"),
}


def plant(text: str) -> None:
    *point, rank, count, folder = text.split()
    if point in (["in", "rows"], ["in", "gradients"]) and os.environ.get("RANK", "0") != rank:
        falter(f"{folder}/fault")
    if os.environ.get("RANK", "0") != rank or os.path.exists(f"{folder}/fault"):
        return
    owner, name = POINTS[" ".join(point)]
    original, left = getattr(owner, name), [int(count)]

    def replaced(*args, **kwargs):
        left[0] -= point[0] != "in" or point[1] not in ("rows", "gradients") or is_in(point[1], args[0])
        if left[0] == 0:
            left[0] = -1
            Path(folder, "fault").touch()
            fail(point[0], args)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def falter(until):
    """Be stopped again and again until there is a fault, so that others wait in the middle of messages."""
    this = os.getpid()
    if not os.fork():
        while not os.path.exists(until) and os.getppid() == this:
            os.kill(this, signal.SIGSTOP)
            time.sleep(0.01)
            os.kill(this, signal.SIGCONT)
            time.sleep(0.002)
        os._exit(0)


def is_in(what, found):
    """Whether a message of this kind has come, or gone, in part."""
    stage = {
        "rows": exchange_between_hosts.hosts.WAIT_FOR_ROWS,
        "gradients": exchange_between_hosts.hosts.WAIT_FOR_GRADIENTS,
    }[what]
    states = found._wire.sent_state, found._wire.coming_state
    parts = [state[state[:, sockets.AT] < state[:, sockets.COUNT]] for state in states]
    begun = any(part[:, [sockets.AT, sockets.DONE]].any() for part in parts)
    return found.control[wire.STAGE] == stage and bool(begun)


def fail(how, args):
    if how == "cut":
        for link in args[0]._transport._data.values():
            link.shutdown(socket.SHUT_RDWR)
    else:
        os.kill(os.getpid(), signal.SIGSTOP if how == "hang" else signal.SIGKILL)


def behave_as_hosts():
    """Each rank takes itself for a host, and its connections hold little at a time."""
    place = ("host", os.environ.get("RANK", "0"))
    shared_memory.here = connecting.here = lambda: place
    original = transport.Transport.__init__

    def narrow(self, *args):
        original(self, *args)
        for link in self._data.values():
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)

    transport.Transport.__init__ = narrow


if __name__ == "__main__":
    if os.environ.get("MFDIST_TEST_WAY") == "sockets":
        behave_as_hosts()
    if fault := os.environ.get("MFDIST_TEST_FAULT"):
        plant(fault)
    process.end(job.job())

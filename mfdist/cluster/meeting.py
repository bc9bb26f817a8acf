"""Where the processes of a job find each other: on one host without a name or a port, between hosts by their names.

    one host        launcher: a file in a private folder         ranks: 127.0.0.1, a port that only this host reaches
    several hosts   launcher: torch's store at --rdzv-endpoint   ranks: torch's store on the host of rank 0

Torch's stores listen on every interface of their host and ask for no password: see k8s/README.md for what keeps others
out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from mfdist.cluster.addresses import is_loopback, way_to
from mfdist.errors import MfdistError

LOOPBACK, LOOPBACK_NAME = "127.0.0.1", "lo"
NAMES_SECONDS = 60.0
"""How long a name may take to resolve: a pod's comes with its pod."""


@contextlib.contextmanager
def for_launchers(args: Namespace, hosts: int) -> Iterator[None]:
    """Complete torchrun's ``args`` for a job of ``hosts`` hosts at most.

    MfdistError where the name of the rendezvous' host, or of this one, does not resolve.
    """
    if args.rdzv_backend not in ("static", "c10d"):
        yield
    elif hosts > 1:
        _check_names(args)
        yield
    else:
        with tempfile.TemporaryDirectory(prefix="mfdist-launch-") as folder:
            args.standalone, args.rdzv_backend, args.rdzv_conf = False, "c10d", "store_type=file"
            args.rdzv_endpoint, args.local_addr = os.path.join(folder, "rendezvous"), LOOPBACK
            if args.rdzv_id == "none":
                args.rdzv_id = str(uuid.uuid4())
            yield


def _check_names(args: Namespace) -> None:
    host = args.rdzv_endpoint or args.master_addr
    host = host.rpartition(":")[0].strip("[]") if ":" in host else host
    if not resolves(host, NAMES_SECONDS):
        raise MfdistError(
            f"the rendezvous' host {host} does not resolve to an address on {socket.gethostname()}; "
            "give --rdzv-endpoint a name that every host knows, or an address."
        )
    if args.local_addr or resolves(socket.getfqdn()):
        return
    own = way_to(host)
    if own is None or is_loopback(own):
        raise MfdistError(
            f"the name of this host, {socket.gethostname()}, does not resolve to an address; give --local-addr "
            "ADDRESS, by which the other hosts reach it."
        )
    args.local_addr = own


def resolves(name: str, patience_seconds: float = 0.0) -> bool:
    """Whether ``name`` has an address, now or within ``patience_seconds``."""
    end = time.monotonic() + patience_seconds
    while True:
        with contextlib.suppress(OSError, UnicodeError):
            return bool(socket.getaddrinfo(name, None))
        if time.monotonic() >= end:
            return False
        time.sleep(1.0)


def one_host(size: int) -> bool:
    """Whether all ``size`` ranks are of this host, as their launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == size


def store_of_ranks(rank: int, size: int, timeout: timedelta) -> dist.Store | None:
    """Where the ranks that torchrun has started meet; None where torch's own way is the right one. Every rank calls.

    On one host ``MASTER_ADDR`` is this host by another name, which may not resolve. Where the launcher does not keep
    the store, rank 0 does, on the loopback device alone.
    """
    if not one_host(size) or "MASTER_PORT" not in os.environ:
        address = os.environ.get("MASTER_ADDR", "")
        if address and not resolves(address, NAMES_SECONDS):
            raise MfdistError(
                f"the host of rank 0, {address}, does not resolve to an address on {socket.gethostname()}; "
                "give the launcher of that host --local-addr ADDRESS."
            )
        return None
    os.environ["MASTER_ADDR"] = LOOPBACK
    port = int(os.environ["MASTER_PORT"])
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(LOOPBACK, port, size, is_master=False, timeout=timeout)
    door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((LOOPBACK, port))
        door.listen(128)
    except OSError as error:
        door.close()
        raise MfdistError(f"the ranks cannot meet at {LOOPBACK}:{port}: {error.strerror}.") from None
    return dist.TCPStore(
        LOOPBACK, port, size, is_master=True, timeout=timeout, multi_tenant=True, master_listen_fd=door.detach()
    )


def keep_to_loopback() -> None:
    """gloo's connections by the loopback device, unless the user has named another: for ranks of one host."""
    if any(name == LOOPBACK_NAME for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_NAME)

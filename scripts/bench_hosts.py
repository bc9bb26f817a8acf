#!/usr/bin/env python
"""What several hosts are worth: training speed over a network, beside one process with all cores and one host alone.

    python scripts/bench_hosts.py --data data/bench/blocks --data data/bench/random --json hosts.json   # as root
    python scripts/bench_hosts.py --data data/bench/blocks --hosts 2 --batch 65536 --delay 0,0.1
    python scripts/bench_hosts.py --data data/bench/blocks --loopback            # ranks of this host, no namespaces
    python scripts/bench_hosts.py --data data/bench/blocks --gpus 1,2,4,8        # ranks of this host with a GPU each

A host is a network namespace with a process and a host name namespace of its own (so that nothing is shared), one
thread pinned to one core. Between them is a bridge, or with --delay a relay in user space, which holds every packet
back for so many milliseconds each way and lets --gbps pass; it takes time of the same cores, so that a delay is to be
compared with a relay of 0. Data and model as in ``bench_train.py``: mf_advanced, 32 factors, exact AdamW, its learning
rate; an epoch is left out (compiled code, first touch), then --epochs are timed, and systems take turns for --rounds.

``efficiency``: the hosts' rate over (one host's rate times hosts) of the same round, the median. Where hosts are more
than cores they share them, which is said. ``waiting``: seconds of a step in which a rank waits for others' messages,
the mean over ranks; ``bytes``: what leaves a rank in a step, headers, requests, rows and gradients. ``apart``: as many
processes with a core each that train at once and know nothing of each other, the sum of their rates: what cores that
share a machine's memory can give at most.

With --gpus a system is so many ranks with a GPU each, over NCCL: "ahead" as training does it, the requests of many
steps learned at once and rows on their way beside the arithmetic; "step by step" with a meeting in every step. Two
epochs are left out there, as the rows move to the device in the second. A rank alone queues its steps as CUDA graphs,
several do not. What a rank waits for others is not seen from its host.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import itertools
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PREFIX, PORT = "10.79.0", 29655
NUMBERS = itertools.count()
PACKET_BYTES = 32768
Row = dict[str, Any]


@dataclass
class System:
    """A line of the table: ``hosts`` 0 is one process with all cores, way "apart" one of processes that do not meet;
    on ``device`` "cuda" ``hosts`` are ranks with a GPU each."""

    name: str
    data: str
    batch: int
    hosts: int
    wire: str = "fp32"
    way: str = "sockets"
    delay_ms: float | None = None
    device: str = "cpu"
    found: list[Row] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="a prepared dataset; again for another order")
    parser.add_argument("--batch", default="8192,65536", help="batch sizes (default %(default)s)")
    parser.add_argument("--hosts", default="2,3,4", help="numbers of hosts (default %(default)s)")
    parser.add_argument("--wire", default="fp32,bf16", help="number formats between hosts (default %(default)s)")
    parser.add_argument("--ways", default="sockets", help="sockets, group (default %(default)s)")
    parser.add_argument("--delay", default="", help="milliseconds each way, such as 0,0.1: by a relay (default: none)")
    parser.add_argument("--gbps", type=float, default=10.0, help="of the relay, each way (default %(default)s)")
    parser.add_argument("--loopback", action="store_true", help="ranks side by side on this host's loopback instead")
    parser.add_argument("--gpus", default="", help="numbers of ranks with a GPU each, such as 1,2,4 (default: CPUs)")
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of a process (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every system (default %(default)s)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # what a process of this program's own does
    flags = parser.parse_args(argv)
    if flags.worker:
        work(json.loads(flags.worker))
        return 0
    systems = list_systems(flags)
    gpus = max((system.hosts for system in systems if system.device == "cuda"), default=0)
    if gpus:
        import torch

        if gpus > torch.cuda.device_count():
            parser.error(f"--gpus {gpus}: there are {torch.cuda.device_count()} here")
    for turn in range(flags.rounds):
        for system in systems[:: 1 - 2 * (turn % 2)]:
            system.found.append(measure(system, flags))
            rate = system.found[-1]["ratings_per_second"] / 1e6
            print(f"round {turn + 1}/{flags.rounds}: {_order(system)} {system.batch} {system.name} {rate:.2f}",
                  file=sys.stderr)  # fmt: skip
        report(systems, flags)
    return 0


def list_systems(flags: argparse.Namespace) -> list[System]:
    found = []
    delays: list[float | None] = [float(text) for text in flags.delay.split(",") if text] or [None]
    for data in flags.data:
        for batch in map(int, flags.batch.split(",")):
            if flags.gpus:
                for ranks in map(int, flags.gpus.split(",")):
                    for wire in flags.wire.split(",") if ranks > 1 else ["fp32"]:
                        for way in ("ahead", "step by step") if ranks > 1 else ("ahead",):
                            name = f"{ranks} GPUs, {way}, {wire}" if ranks > 1 else "1 GPU"
                            found.append(System(name, data, batch, ranks, wire, way, device="cuda"))
                continue
            found.append(System("one process, all cores", data, batch, 0))
            found.append(System("one host, one core", data, batch, 1))
            for hosts in map(int, flags.hosts.split(",")):
                if hosts <= len(os.sched_getaffinity(0)):
                    found.append(System(f"{hosts} processes, apart", data, batch, hosts, way="apart"))
                for wire in flags.wire.split(","):
                    for way in flags.ways.split(","):
                        for delay in delays:
                            name = f"{hosts} {'ranks' if flags.loopback else 'hosts'}, {way}, {wire}"
                            name += "" if delay is None else f", relay {delay:g} ms"
                            found.append(System(name, data, batch, hosts, wire, way, delay))
    return found


def measure(system: System, flags: argparse.Namespace) -> Row:
    """Run a system once: the rate of all its ranks, and what rank 0 says of a step."""
    size, cores = max(system.hosts, 1), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        apart = system.way == "apart"
        alone = size == 1 or flags.loopback or apart or system.device == "cuda"
        if alone:
            places, address = [[]] * size, "127.0.0.1"
        else:
            places, address = stack.enter_context(network(size, system.delay_ms, flags.gbps)), f"{PREFIX}.1"
        processes = []
        for rank in range(size):
            task = {"data": system.data, "run": f"{folder}/run-{rank if apart else 0}", "batch": system.batch,
                    "epochs": flags.epochs, "wire": system.wire, "way": system.way,
                    "device": system.device}  # fmt: skip
            whole = system.hosts == 0 or system.device == "cuda"
            threads = max(1, len(cores) // size) if whole else 1
            pins = cores if whole else [cores[rank % len(cores)]]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads),
                           "GLOO_SOCKET_IFNAME": "lo" if alone else "eth0"}  # fmt: skip
            if size > 1 and not apart:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": address,
                                "MASTER_PORT": str(PORT), "LOCAL_RANK": str(rank if alone else 0),
                                "LOCAL_WORLD_SIZE": str(size if alone else 1)}  # fmt: skip
            command = [*places[rank], "taskset", "-c", ",".join(map(str, pins)), sys.executable, __file__,
                       "--data", system.data, "--worker", json.dumps(task)]  # fmt: skip
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in processes]
        codes = [process.returncode for process in processes]
        if any(codes):
            raise SystemExit(f"{system.name}: the ranks ended with {codes}")
    found: Row = json.loads(said[0].splitlines()[-1])
    if apart:
        found["ratings_per_second"] = sum(json.loads(one.splitlines()[-1])["ratings_per_second"] for one in said)
    return found


# The hosts ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def network(size: int, delay_ms: float | None, gbps: float) -> Iterator[list[list[str]]]:
    """Hosts beside each other: for each the words that a command of it begins with."""
    tag = f"{os.getpid() % 100_000}x{next(NUMBERS)}"  # a name is free again only a while after it was given up
    names = [f"mfbench{tag}-{rank}" for rank in range(size)]
    bridge = f"mfb{tag}"
    relay = None
    try:
        if delay_ms is None:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        if delay_ms is None:
            for rank, name in enumerate(names):
                link = f"mfv{tag}-{rank}"
                _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", link, "master", bridge, "up")
        else:
            relay = Relay(names, delay_ms, gbps)
        for rank, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"{PREFIX}.{rank + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        if relay is not None:
            relay.start()
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        yield [
            ["ip", "netns", "exec", name, *apart, f'hostname host-{rank}; exec "$@"', "sh"]
            for rank, name in enumerate(names)
        ]
    finally:
        if relay is not None:
            relay.stop()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Relay:
    """Takes every host's packets from a tunnel, and gives them to the other's when their time has come."""

    def __init__(self, names: Sequence[str], delay_ms: float, gbps: float) -> None:
        self._delay, self._seconds_a_byte = delay_ms / 1e3, 8 / (gbps * 1e9)
        self._tunnels = []
        for rank, name in enumerate(names):
            tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            own = f"mft{os.getpid()}-{rank}".encode()
            fcntl.ioctl(tunnel, 0x400454CA, struct.pack("16sH", own, 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
            self._tunnels.append(tunnel)
            _ip("link", "set", own.decode(), "netns", name)
            _ip("-n", name, "link", "set", own.decode(), "name", "eth0", "mtu", str(PACKET_BYTES), "txqueuelen", "5000")
        self._process = 0

    def start(self) -> None:
        self._process = os.fork()
        if not self._process:
            with contextlib.suppress(KeyboardInterrupt):
                self._run()
            os._exit(0)

    def stop(self) -> None:
        if self._process:
            os.kill(self._process, 15)
            os.waitpid(self._process, 0)
        for tunnel in self._tunnels:
            os.close(tunnel)

    def _run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []  # when due, number, to whom, what
        free = [0.0] * len(self._tunnels)  # when the line out of each host is free again
        number = 0
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, target, packet = heapq.heappop(waiting)
                with contextlib.suppress(BlockingIOError):  # full: dropped, as a switch would
                    os.write(self._tunnels[target], packet)
            due = max(0.0, waiting[0][0] - now) if waiting else 1.0
            for tunnel in select.select(self._tunnels, [], [], due)[0]:
                host = self._tunnels.index(tunnel)
                packet = os.read(tunnel, PACKET_BYTES + 64)
                target = packet[19] - 1 if packet[0] >> 4 == 4 and packet[16:19] == bytes((10, 79, 0)) else -1
                if 0 <= target < len(self._tunnels):
                    free[host] = max(free[host], time.monotonic()) + len(packet) * self._seconds_a_byte
                    number += 1
                    heapq.heappush(waiting, (free[host] + self._delay, number, target, packet))


# In a process of its own --------------------------------------------------------------------------


def work(task: dict[str, Any]) -> None:
    """Train; rank 0 prints what it has measured."""
    import torch

    from mfdist.cluster.world import World
    from mfdist.data.dataset import Dataset
    from mfdist.data.loader import Loader
    from mfdist.log import Console
    from mfdist.training.config import TrainConfig
    from mfdist.training.session import build, restore_or_initialise
    from mfdist.training.train import batches_of, collector_at_ease, train_step

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with World.open(task["device"]) as world:
        world.may_share, world.may_connect = False, task["way"] == "sockets"
        left_out = 2 if world.device.type == "cuda" else 1
        epochs = left_out + task["epochs"]
        config = TrainConfig.ready(
            "vignette_mf_advanced",
            data=task["data"],
            run_dir=task["run"],
            batch_size=task["batch"],
            epochs=epochs,
            wire_dtype=task["wire"],
            device=task["device"],
        )
        Path(task["run"]).mkdir(parents=True, exist_ok=True)
        dataset = Dataset.open(task["data"])
        with Loader(dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank,
                    world_size=world.size, device=world.device) as loader:  # fmt: skip
            session = build(config, dataset, world, Console(False), loader)
            try:
                restore_or_initialise(session)
                rates, steps, began, before = [], 0, 0.0, {}
                with collector_at_ease():
                    for epoch in range(epochs):
                        world.barrier()
                        if epoch == left_out:
                            before = session.fused.traffic  # type: ignore[union-attr]
                        began = time.perf_counter()
                        announced = task["way"] != "step by step"
                        for batch in batches_of(session, epoch) if announced else loader.epoch(epoch):
                            train_step(session, batch)
                            steps += epoch >= left_out
                        if world.device.type == "cuda":
                            torch.cuda.synchronize()
                        world.barrier()
                        rates.append(loader.num_rows / (time.perf_counter() - began))
                after = session.fused.traffic  # type: ignore[union-attr]
                spent = world.sum([(after[key] - before[key]) / steps for key in sorted(after)]) / world.size
                transport = session.fused.transport  # type: ignore[union-attr]
            finally:
                session.saver.close()
                session.fused.close()  # type: ignore[union-attr]
        if world.is_main:
            rate = statistics.median(rates[left_out:])
            print(json.dumps({
                "ratings_per_second": rate, "step_seconds": task["batch"] / rate, "transport": transport,
                **{f"{key}_per_step": value for key, value in zip(sorted(after), spent, strict=True)},
            }))  # fmt: skip


# Figures ------------------------------------------------------------------------------------------


def report(systems: Sequence[System], flags: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"\n{cores} cores, medians of {len(systems[0].found)} rounds, synthetic ratings: speed only")
    print(f"{'order':8}{'batch':>8}  {'system':36}{'M ratings/s':>12}{'efficiency':>11}{'of all cores':>13}"
          f"{'step us':>9}{'waiting us':>11}{'KB a step':>10}")  # fmt: skip
    rows = []
    for system in systems:
        peers = [other for other in systems if (other.data, other.batch) == (system.data, system.batch)]
        one = next((other for other in peers if other.hosts == 1), peers[0])
        whole = next((other for other in peers if other.hosts == 0), one)
        middle = {key: statistics.median(row[key] for row in system.found) for key, value in system.found[0].items()
                  if not isinstance(value, str)}  # fmt: skip
        efficiency = _ratio(system, one) * max(1, one.hosts) / max(1, system.hosts)
        beside = _ratio(system, whole)
        shared = " (cores shared)" if system.hosts > cores and system.device == "cpu" else ""
        waited = "-" if system.device == "cuda" else f"{middle['wait_seconds_per_step'] * 1e6:.0f}"
        print(f"{_order(system):8}{system.batch:>8}  {system.name + shared:36}"
              f"{middle['ratings_per_second'] / 1e6:12.2f}{efficiency:11.2f}{beside:13.2f}"
              f"{middle['step_seconds'] * 1e6:9.0f}{waited:>11}"
              f"{middle['bytes_per_step'] / 1e3:10.1f}")  # fmt: skip
        rows.append({"system": "mfdist", "algorithm": "adamw", "exact": True, "device": system.device,
                     "threads": 1 if system.device == "cpu" else 0, "order": _order(system),
                     "batch_size": system.batch, "hosts": system.hosts, "name": system.name,
                     "wire": system.wire, "way": system.way, "delay_ms": system.delay_ms, "efficiency": efficiency,
                     "of_all_cores": beside, "cores_shared": bool(shared), "rounds": system.found,
                     **middle})  # fmt: skip
    if flags.json:
        machine = {"cores": cores, "gbps_of_relay": flags.gbps, "loopback": flags.loopback, **_gpu()}
        Path(flags.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _ratio(one: System, other: System) -> float:
    pairs = zip(one.found, other.found, strict=False)
    return statistics.median(a["ratings_per_second"] / b["ratings_per_second"] for a, b in pairs)


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "nccl": torch.cuda.nccl.version()}


def _order(system: System) -> str:
    manifest = json.loads(Path(system.data, "dataset.json").read_text())
    return str(manifest["order"])


if __name__ == "__main__":
    sys.exit(main())

"""Faults between hosts: who is lost is named, all end, and the job resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faulty_jobs import (
    NUMBERS,
    WIDE,
    complete,
    log_of,
    small_dataset,
    start,
    wait_for_step,
)
from pods import ip
from pods import missing as no_namespaces

BETWEEN_HOSTS = [
    ("first step", 1, 1), ("mid-step", 0, 23), ("in rows", 0, 3), ("in rows", 1, 9), ("in gradients", 0, 4),
    ("in gradients", 1, 11), ("check", 0, 5), ("flush", 0, 2), ("before COMMIT", 0, 3), ("evaluation", 1, 2),
    ("cut", 0, 12), ("cut", 1, 37), ("hang", 1, 20),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_dataset(tmp_path_factory)


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The export of the undisturbed run on two ranks."""
    return complete(data, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def expected_wide(data, tmp_path_factory):
    return complete(data, tmp_path_factory.mktemp("wide") / "run", flags=WIDE)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "rank", "count"), BETWEEN_HOSTS, ids=lambda value: str(value).replace(" ", "-"))
def test_a_fault_between_hosts_names_the_rank_and_the_job_resumes(data, expected_wide, tmp_path, point, rank, count):
    """Ranks that go by sockets, and messages in pieces. A hang is noticed after ten seconds, anything else at once."""
    run = tmp_path / "run"
    began = time.time()
    process = start(data, run, flags=WIDE, way="sockets", fault=f"{point} {rank} {count} {tmp_path}")
    assert process.wait(240) == 1
    assert (tmp_path / "fault").exists(), f"{point} was never reached"
    assert time.time() - max(began, (tmp_path / "fault").stat().st_mtime) < (60 if point == "hang" else 30)
    log = log_of(run)
    assert "sockets between the ranks of 2 hosts" in log, log
    named = f"the contact to rank {rank} of this job"
    if point == "hang":
        assert named in log and "it has not answered for 10 seconds" in log, log
    elif point == "cut":  # each sees the other one vanish
        assert "the contact to rank " in log and "was lost: it" in log, log
    else:
        assert log.count("Root Cause") == 1 and "Signal 9 (SIGKILL)" in log, log
        assert f"the contact to rank {1 - rank} of this job" not in log and log.count(f"error: {named}") <= 1, log
    assert complete(data, run, flags=WIDE, way="sockets") == expected_wide


@pytest.mark.slow
def test_stopped_between_hosts_and_continued_on_one(data, expected_wide, tmp_path):
    """What a rank has done ahead when it stops changes no bit, whatever the next start goes by."""
    for number, ways in enumerate((("sockets", ""), ("", "sockets"))):
        run = tmp_path / f"run{number}"
        flags = [*WIDE, "--checkpoint-every=7"]
        process = start(data, run, flags=flags, way=ways[0])
        wait_for_step(run, 7, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75, log_of(run)
        assert complete(data, run, flags=flags, way=ways[1]) == expected_wide


@contextlib.contextmanager
def hosts(count):
    """Network namespaces on one bridge: their names and addresses."""
    tag = f"mf{os.getpid() % 100_000}x{next(NUMBERS)}"  # names of interfaces have 15 characters
    names = [f"{tag}-{k}" for k in range(count)]
    try:
        ip("link", "add", tag, "type", "bridge")
        ip("link", "set", tag, "up")
        for k, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"{tag}v{k}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{tag}v{k}", "master", tag, "up")
            ip("-n", name, "addr", "add", f"10.78.0.{k + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in found.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", tag], capture_output=True, check=False)


def start_hosts(data, run, names, restarts=0):
    """One agent with one worker a host, c10d rendezvous on the first."""
    found = []
    for k, name in enumerate(names):
        launch = (f"--nnodes={len(names)}", "--rdzv-backend=c10d", "--rdzv-endpoint=10.78.0.1:29555", "--rdzv-id=test",
                  f"--rdzv-conf=is_host={int(k == 0)},join_timeout=60,read_timeout=20", f"--local-addr=10.78.0.{k + 1}",
                  f"--max-restarts={restarts}")  # fmt: skip
        shell = ("unshare", "--uts", "sh", "-c", f'hostname host-{k}; exec "$@"', "sh")
        found.append(start(data, run, 1, launch=launch, space=name, log=f"{run}.log", shell=shell))
    return found


@pytest.mark.slow
@pytest.mark.skipif(no_namespaces() is not None, reason=str(no_namespaces()))
def test_sigterm_to_one_of_two_agents_stops_both(data, expected, tmp_path):
    run = tmp_path / "run"
    with hosts(2) as names:
        agents = start_hosts(data, run, names)
        wait_for_step(run, 9, agents[0])
        began = time.monotonic()
        agents[1].send_signal(signal.SIGTERM)
        assert [agent.wait(60) for agent in agents] == [75, 75], log_of(run)
        assert time.monotonic() - began < 30
        again = start_hosts(data, run, names)
        assert [agent.wait(240) for agent in again] == [0, 0], log_of(run)
    assert Path(run, "model/model.safetensors").read_bytes() == expected


@pytest.mark.slow
@pytest.mark.skipif(no_namespaces() is not None, reason=str(no_namespaces()))
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_lost_host_ends_the_others_and_the_job_resumes(data, expected, tmp_path, how):
    """Killed: the others end within 30 s. Cut off (nothing arrives any more, no connection is closed): within 90 s."""
    run = tmp_path / "run"
    with hosts(2) as names:
        agents = start_hosts(data, run, names)
        wait_for_step(run, 9, agents[0])
        began = time.monotonic()
        if how == "cut off":
            ip("-n", names[1], "link", "set", "eth0", "down")
        else:
            for pid in subprocess.run(["ip", "netns", "pids", names[1]], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
        assert agents[0].wait(120) in (1, 75), log_of(run)
        assert time.monotonic() - began < (30 if how == "killed" else 90)
        agents[1].kill()
        agents[1].wait()
    with hosts(2) as names:
        again = start_hosts(data, run, names)
        assert [agent.wait(240) for agent in again] == [0, 0], log_of(run)
    assert Path(run, "model/model.safetensors").read_bytes() == expected


# Storage ------------------------------------------------------------------------------------------

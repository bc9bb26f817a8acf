"""One job at a time in a run directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from mfdist.errors import MfdistError
from mfdist.run import lease
from mfdist.run.lease import Lease


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    for name in ("SLURM_JOB_ID", "JOB_COMPLETION_INDEX", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def plant(run, **changes):
    """A lease as another process would have left it."""
    other = {**lease.identity(), "token": "other", "beat": 7, **changes}
    (run / "lease.json").write_text(json.dumps(other))


def take(run, said=None):
    with Lease(str(run), (said if said is not None else []).append):
        return json.loads((run / "lease.json").read_text())


def test_a_second_job_is_refused_with_host_and_pid_and_the_lease_ends_with_the_job(tmp_path):
    with Lease(str(tmp_path), print):
        child = f"from mfdist.run.lease import Lease\nLease({str(tmp_path)!r}, print).__enter__()"
        found = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in found.stderr
    assert not (tmp_path / "lease.json").exists()
    take(tmp_path)


def test_a_dead_process_of_this_host_is_followed_at_once(tmp_path):
    child = f"from mfdist.run.lease import Lease\nimport os\nLease({str(tmp_path)!r}, print).__enter__()\nos._exit(9)"
    subprocess.run([sys.executable, "-c", child], check=False)
    assert (tmp_path / "lease.json").exists()
    said = []
    assert take(tmp_path, said)["pid"] == os.getpid() and not said


@pytest.mark.parametrize(
    "changes",
    [{"started": "1"}, {"boot": "another"}, {"token": "../../x"}, {"pid": "many"}],
    ids=[
        "the pid is another process now",
        "the host was started again",
        "a token that is a path",
        "a pid that is none",
    ],
)
def test_followed_at_once(tmp_path, changes):
    plant(tmp_path, **changes)
    take(tmp_path)


@pytest.mark.parametrize(
    "env",
    [{"SLURM_JOB_ID": "77"}, {"JOB_COMPLETION_INDEX": "0", "HOSTNAME": "train-0"}, {"TORCHELASTIC_RUN_ID": "abc"}],
    ids=["slurm", "kubernetes", "torchrun"],
)
def test_the_same_scheduler_job_follows_at_once_and_another_waits(tmp_path, monkeypatch, env):
    if host := env.pop("HOSTNAME", None):
        monkeypatch.setattr(socket, "gethostname", lambda: host)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    plant(tmp_path, host="elsewhere")
    take(tmp_path)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    plant(tmp_path, host="elsewhere", job="slurm other 78")
    said = []
    take(tmp_path, said)
    assert len(said) == 1 and "elsewhere" in said[0] and "waiting" in said[0]


def test_a_holder_elsewhere_that_beats_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 30.0)  # the first beat ends the waiting
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    holder = Lease(str(tmp_path), print)
    holder._me["host"] = "elsewhere"
    with holder, pytest.raises(MfdistError, match=r"in use by process .* on elsewhere"):
        take(tmp_path)


def test_who_lost_the_lease_may_not_commit_and_does_not_remove_it(tmp_path):
    with Lease(str(tmp_path), print) as mine:
        mine.check()
        plant(tmp_path, host="newcomer", pid=5)
        with pytest.raises(MfdistError, match="taken over by process 5 on newcomer"):
            mine.check()
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "newcomer"


def test_a_lease_on_an_object_store():
    run = f"memory://lease-{time.time_ns()}"
    with Lease(run, print) as mine:
        mine.check()
        with pytest.raises(MfdistError, match="in use"):
            Lease(run, print).__enter__()
    with Lease(run, print):
        pass


def test_a_directory_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def refuse(path, text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lease.storage, "create", refuse)
    with pytest.raises(MfdistError, match=r"cannot be written .Read-only file system"):
        Lease(str(tmp_path), print).__enter__()


def test_a_lease_that_could_not_be_removed_does_not_hold_up_its_own_process(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lease.storage, "remove", lambda path: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        take(tmp_path)
    assert (tmp_path / "lease.json").exists()
    with Lease(str(tmp_path), print), pytest.raises(MfdistError, match=f"in use by process {os.getpid()}"):
        take(tmp_path)


@pytest.mark.parametrize("clock", [3600.0, -3600.0])
def test_clocks_are_not_compared(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.4)
    plant(tmp_path, host="elsewhere", time=time.time() + clock)
    began = time.monotonic()
    take(tmp_path)
    assert 0.4 <= time.monotonic() - began < 5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_junk_holds_nothing(tmp_path, content):
    (tmp_path / "lease.json").write_bytes(content)
    assert take(tmp_path)["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


RACER = """
import os, sys, time
from mfdist.errors import MfdistError
from mfdist.run import lease
from mfdist.run.lease import Lease
lease.BEAT_SECONDS = 1e6  # a beat that is cut off at the end would leave its file
folder, rounds = sys.argv[1], int(sys.argv[2])
for number in range(rounds):
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        held = Lease(f"{folder}/{number}", lambda text: None).__enter__()
        print("held", flush=True)
    except MfdistError as error:
        print("refused" if "in use" in str(error) else error, flush=True)
sys.stdin.readline()
os._exit(0)
"""


@pytest.mark.parametrize(
    "before",
    ["nobody", pytest.param("a dead holder", marks=pytest.mark.slow),
     pytest.param("a dead follower of a dead holder", marks=pytest.mark.slow)],
)  # fmt: skip
def test_of_those_who_come_at_once_one_holds(tmp_path, before):
    rounds = 200
    for number in range(rounds if before != "nobody" else 0):
        (tmp_path / str(number)).mkdir()
        plant(tmp_path / str(number), started="1")
        if "follower" in before:
            other = {**lease.identity(), "token": "follower", "started": "1", "beat": 1}
            (tmp_path / str(number) / "lease.json.after-other").write_text(json.dumps(other))
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(rounds)], text=True, bufsize=1,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    for number in range(rounds):
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 3
        for racer in racers:
            racer.stdin.write("go\n")
        answers = sorted(racer.stdout.readline() for racer in racers)
        assert answers == ["held\n", "refused\n", "refused\n"], number
    for racer in racers:
        racer.communicate(timeout=30)
    assert {name for number in range(rounds) for name in os.listdir(tmp_path / str(number))} == {"lease.json"}

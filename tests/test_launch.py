"""``python -m mfdist.launch``: exit codes, signals and restarts, with small workers under the real agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfdist.cluster import launch
from mfdist.errors import UsageError, exit_code_of
from mfdist.process import STOP_SIGNALS

# argv[1]: a folder for notes; argv[2 + rank]: what this rank does.
WORKER = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), sys.argv[1]
action = sys.argv[2 + rank]

def note(text):
    with open(f"{folder}/{text}", "a") as file:
        file.write(f"{os.getpid()}\\n")

def stop(number, frame):
    note(f"rank{rank}-{signal.Signals(number).name}")
    if action == "slow":
        time.sleep(1.5)
        note(f"rank{rank}-saved")
    os._exit(75)

if action in ("wait", "slow"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, stop)
note(f"rank{rank}-omp{os.environ['OMP_NUM_THREADS']}")
note(f"rank{rank}-started")
if action.startswith("then"):  # fails once, then ends with the given code
    attempt = len(open(f"{folder}/rank{rank}-started").readlines())
    sys.exit(1 if attempt == 1 else int(action[4:]))
if action in ("wait", "slow", "deaf"):
    time.sleep(60)
sys.exit(int(action))
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return str(path)


def run_here(worker: str, folder: Path, *actions: str, flags: tuple[str, ...] = ()) -> int:
    """The exit code of the launcher, run in this process."""
    argv = ["--standalone", f"--nproc-per-node={len(actions)}", *flags, worker, str(folder), *actions]
    return launch.main(argv)


def start(
    worker: str, folder: Path, *actions: str, flags: tuple[str, ...] = ("--standalone",)
) -> subprocess.Popen[str]:
    """The launcher in a process of its own, all ranks started."""
    command = [sys.executable, "-m", "mfdist.launch", *flags, f"--nproc-per-node={len(actions)}", worker, str(folder)]
    process = subprocess.Popen([*command, *actions], stderr=subprocess.PIPE, text=True)
    wait_for(*(folder / f"rank{rank}-started" for rank in range(len(actions))))
    return process


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of {paths} after 120 s"
        time.sleep(0.05)


def no_worker_left(folder: Path) -> bool:
    pids = {int(line) for path in folder.glob("rank*-started") for line in path.read_text().split()}
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("actions", "code"),
    [
        (("0", "0"), 0),
        (("75", "75"), 75),
        (("75", "wait"), 75),
        (("deaf", "75"), 75),
        (("wait", "3"), 3),
        (("2", "2"), 2),
        (("1", "wait"), 1),
    ],
)
def test_exit_code_of_workers(
    worker: str, tmp_path: Path, actions: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    handler = signal.getsignal(signal.SIGUSR1)
    assert run_here(worker, tmp_path, *actions) == code
    assert no_worker_left(tmp_path)
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_a_crash_prints_the_cause_and_a_stop_does_not(
    worker: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_here(worker, tmp_path, "75", "wait")
    assert "Root Cause" not in capfd.readouterr().err
    run_here(worker, tmp_path, "wait", "7")
    assert "exitcode  : 7" in capfd.readouterr().err.split("Root Cause")[1]


def test_a_crash_is_restarted_and_a_final_code_is_not(worker: str, tmp_path: Path) -> None:
    assert run_here(worker, tmp_path, "then0", flags=("--max-restarts=2",)) == 0
    assert len((tmp_path / "rank0-started").read_text().split()) == 2
    for code in (75, 4):
        (tmp_path / "rank0-started").unlink()
        assert run_here(worker, tmp_path, f"then{code}", flags=("--max-restarts=3",)) == code
        assert len((tmp_path / "rank0-started").read_text().split()) == 2


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_reaches_every_worker_once_and_gives_75(worker: str, tmp_path: Path, number: signal.Signals) -> None:
    process = start(worker, tmp_path, "wait", "wait")
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    for rank in range(2):
        assert len((tmp_path / f"rank{rank}-{number.name}").read_text().split()) == 1
    assert no_worker_left(tmp_path)


def test_a_second_signal_does_not_cut_a_save_short(worker: str, tmp_path: Path) -> None:
    process = start(worker, tmp_path, "slow", "slow")
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / "rank0-SIGUSR1", tmp_path / "rank1-SIGUSR1")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert (tmp_path / "rank0-saved").exists() and (tmp_path / "rank1-saved").exists()
    assert no_worker_left(tmp_path)


def test_workers_that_do_not_stop_are_killed_after_the_time_out(worker: str, tmp_path: Path) -> None:
    script = Path(worker)
    script.write_text("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + script.read_text())
    process = start(worker, tmp_path, "deaf", flags=("--standalone", "--shutdown-timeout=1"))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (process.returncode, no_worker_left(tmp_path)) == (143, True)
    assert time.monotonic() - began < 25  # torch's own is 30


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_worker_that_answers_no_signal_promises_no_checkpoint(
    worker: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(worker, tmp_path, "deaf", "deaf")
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert (process.returncode, no_worker_left(tmp_path)) == (128 + number, True)
    assert f"{number.name} received, exit code {128 + number}; no checkpoint was written for it" in text


def test_under_nohup_a_closed_terminal_stops_nothing(worker: str, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(worker, tmp_path, "wait")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    time.sleep(1.5)
    assert process.poll() is None and not (tmp_path / "rank0-SIGHUP").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75


def test_a_signal_while_waiting_for_the_other_hosts_gives_its_own_code(worker: str, tmp_path: Path) -> None:
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=is_host=1"]
    command = [sys.executable, "-m", "mfdist.launch", *flags, "--nproc-per-node=1", worker, str(tmp_path), "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    handled = signal.SIGUSR1
    end = time.monotonic() + 120
    while not _catches(process.pid, handled):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(handled)
    process.communicate(timeout=120)
    assert process.returncode == 128 + handled
    assert not (tmp_path / "rank0-started").exists()


def _catches(pid: int, number: signal.Signals) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([75, -15], 75), ([-9, 75], 1), ([1, 75], 1), ([-15, 3], 3), ([4, 4], 4), ([5], 5), ([75, -6], 75), ([-11], 1)],
)
def test_the_first_failure_is_the_cause(codes: list[int], expected: int) -> None:
    assert launch.code_of_failures(codes) == expected


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], 143), ([0, 0], 0), ([0, 75], 75), ([75, 75], 75), ([-9, 75], 75), ([-15], 143), ([-9, 0], 143), ([130], 143),
     ([1, 75], 1), ([2, 75], 2)],
)  # fmt: skip
def test_after_a_signal(codes: list[int], expected: int) -> None:
    assert launch.code_after_signal(codes, signal.SIGTERM) == expected


def test_threads_are_shared_out(worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_here(worker, tmp_path, "0", "0")
    assert (tmp_path / "rank0-omp3").exists() and (tmp_path / "rank1-omp3").exists()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run_here(worker, tmp_path, "0", "0")
    assert (tmp_path / "rank0-omp5").exists()


def test_the_jobs_flags_are_not_taken_for_torchruns(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(sys.argv[1:] != ['--run-dir', 'r', '--max', '1'])")
    assert launch.main(["--standalone", "--nproc-per-node=1", str(script), "--run-dir", "r", "--max", "1"]) == 0


def test_usable_cores_is_within_the_affinity() -> None:
    assert 1 <= launch.usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("name", "index", "flags", "expected"),
    [
        ("JOB_COMPLETION_INDEX", "0", ("--rdzv-backend=c10d", "--rdzv-endpoint=job-0.svc:29400"), "is_host=1"),
        ("SLURM_NODEID", "2", ("--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400"), "is_host=0"),
        ("SLURM_NODEID", "2", ("--rdzv-backend=c10d", "--rdzv-endpoint=n:1", "--rdzv-conf=is_host=1"), "is_host=1"),
        ("SLURM_NODEID", "2", ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"), ""),
        ("SLURM_NODEID", "2", ("--standalone",), ""),
    ],
)
def test_index_zero_keeps_the_rendezvous_store(
    name: str, index: str, flags: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, index)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = launch.run.parse_args([*flags, "script.py"])
    launch._check_and_complete(args)
    assert args.rdzv_conf == expected


@pytest.mark.parametrize("flag", ["--nproc-per-node=many", "--nnodes=two"])
def test_a_bad_flag_is_a_usage_error_that_names_it(worker: str, flag: str) -> None:
    with pytest.raises(UsageError, match=flag.split("=")[1]):
        launch.main([flag, worker])


def test_hosts_that_do_not_meet_are_named(worker: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-conf=is_host=0,read_timeout=1"]
    assert exit_code_of(lambda: launch.main([*flags, "--nproc-per-node=1", worker])) == 1
    assert "did not find each other at 127.0.0.1:1" in capfd.readouterr().err

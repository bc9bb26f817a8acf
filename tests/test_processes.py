"""A job and what surrounds it: signals, a console that goes away, names, letters, folders, ports."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import make_dataset

from mfdist import process
from mfdist.cluster import meeting
from mfdist.cluster.world import World
from mfdist.errors import MfdistError, UsageError, exit_code_of
from mfdist.log import Console
from mfdist.results.evaluate import EvaluateConfig, evaluate_runs
from mfdist.results.trained_on import dataset_of_run
from mfdist.run import checkpoint
from mfdist.run.stopping import StopWatch
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

ROOT = Path(__file__).parents[1]
QUIET = Console(speaks=False)
FLAGS = ["--config=vignette_mf_advanced", "--batch-size=50", "--emb-dim=4", "--device=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("data") / "small")
    make_dataset(path, rows=1500, lanes=3, val_rows=200, users=150, items=60)
    return path


def config(data, run, **values):
    values = {"epochs": 1, "batch_size": 100, "emb_dim": 4, "device": "cpu", **values}
    return TrainConfig.ready("vignette_mf_advanced", data=str(data), run_dir=str(run), **values)


def launch(ranks, *flags):
    return [sys.executable, "-m", "mfdist.launch", f"--nproc-per-node={ranks}", *flags]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", process.STOP_SIGNALS)
def test_a_job_answers_every_signal_that_the_launcher_passes_on(number):
    before = signal.getsignal(number)
    with StopWatch(None, None) as watch:
        os.kill(os.getpid(), number)
        assert watch.reason() == f"received {number.name}"
    assert signal.getsignal(number) == before


def test_a_job_under_nohup_ignores_a_closed_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopWatch(None, None) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.reason() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_gives_75_with_a_checkpoint_and_no_lease(data, tmp_path):
    run = tmp_path / "run"
    command = launch(1, str(ROOT / "jobs/train.py"), "--data", data, "--run-dir", str(run), *FLAGS, "--epochs=10000",
                     "--checkpoint-every=20")  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while not checkpoint.committed_steps(str(run)):
            assert time.monotonic() < end and job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        earlier = checkpoint.committed_steps(str(run))[-1]
        job.send_signal(signal.SIGHUP)
        assert job.wait(60) == 75, (tmp_path / "log").read_text()
    finally:
        job.terminate()
        job.wait(60)
    assert checkpoint.committed_steps(str(run))[-1] > earlier
    assert not (run / "lease.json").exists()
    stop = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert (stop["kind"], stop["reason"]) == ("stop", "received SIGHUP")


# The console --------------------------------------------------------------------------------------


def test_training_whose_reader_has_gone_goes_on_and_notes_what_it_could_not_show(data, tmp_path):
    command = [sys.executable, str(ROOT / "jobs/train.py"), "--data", data, "--run-dir", str(tmp_path / "run"), *FLAGS,
               "--epochs=3"]  # fmt: skip
    job = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.readline()  # as head -1 does
    job.stdout.close()
    with job.stderr:
        said = job.stderr.read().decode()
    assert job.wait(240) == 0 and "Traceback" not in said and "pipe" not in said.lower(), said
    assert (tmp_path / "run/report.json").exists()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [record["text"] for record in records if record["kind"] == "console"]
    assert any(line.startswith("epoch 3/3") for line in lines), lines


class Pipe(io.StringIO):
    """A text stream that shows ``lines`` lines and then fails as the system does with ``number``."""

    def __init__(self, lines, number):
        super().__init__()
        self.lines, self.number = lines, number

    def write(self, text):
        if self.lines == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.lines -= text.count("\n")
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_lines_that_cannot_be_shown_are_kept_in_order(monkeypatch, number):
    monkeypatch.setattr(sys, "stdout", Pipe(1, number))
    console, kept = Console(), []
    for text in ("one", "two"):
        console.info(text)
    console.instead(kept.append)
    console.info("three")
    assert (sys.stdout.getvalue(), kept) == ("one\n", ["two", "three"])


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_job_that_prints_to_nobody_ends_as_it_would(monkeypatch, number):
    monkeypatch.setattr(sys, "stdout", Pipe(0, number))
    monkeypatch.setattr(sys, "stderr", Pipe(0, number))

    def job():
        print("a table")
        raise UsageError("a mistake")

    assert exit_code_of(job) == 2


def test_a_table_that_does_not_fit_on_the_disk_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Pipe(0, errno.ENOSPC))
    assert exit_code_of(lambda: print("a table")) == 1
    assert "error: No space left on device" in capsys.readouterr().err


def test_a_table_that_the_last_flush_cannot_write_is_an_error_too(tmp_path):
    text = (
        "import sys; from mfdist import process; from mfdist.errors import exit_code_of;"
        "process.end(exit_code_of(lambda: print('a table')))"
    )
    with open("/dev/full", "w") as full:
        program = ended(text, tmp_path, stdout=full)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 1 and said.startswith(b"error: No space left on device"), said


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_program_that_is_started_without_a_console_ends_as_it_would(tmp_path, closed):
    text = (
        "from mfdist import process; from mfdist.loading import loading; from mfdist.errors import exit_code_of\n"
        "with loading(): pass\n"
        "process.end(exit_code_of(lambda: print('a table') or 75))"
    )
    command = f'exec "$0" -c "$1" {closed}'
    variables = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(["sh", "-c", command, sys.executable, text], cwd=tmp_path, env=variables, timeout=60)
    assert done.returncode == 75


# Folders ------------------------------------------------------------------------------------------


def test_a_relative_dataset_is_found_from_another_folder(data, tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    shutil.copytree(data, home / "ds")
    other.mkdir()
    monkeypatch.chdir(home)
    train(config("ds", "run"), World.alone(), QUIET)
    first = evaluate_runs(EvaluateConfig(runs=("run",)), World.alone())
    monkeypatch.chdir(other)
    again = evaluate_runs(EvaluateConfig(runs=("../home/run",)), World.alone())
    assert again["runs"][0]["slices"] == first["runs"][0]["slices"]
    # A run goes on where the very same directories are named from elsewhere, the run that it began with too.
    train(config("../home/ds", "../home/next", init_from="../home/run"), World.alone(), QUIET)
    monkeypatch.chdir(home)
    train(config("ds", "next", init_from="run", epochs=2), World.alone(), QUIET)
    # Both moved together.
    monkeypatch.chdir(tmp_path)
    home.rename(tmp_path / "moved")
    assert os.path.samefile(dataset_of_run("moved/run"), "moved/ds")
    shutil.rmtree("moved/ds")
    with pytest.raises(UsageError, match="not there now; give --data"):
        dataset_of_run("moved/run")


# Letters ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_every_job_knows_paths_of_other_letters_in_an_ascii_locale(tmp_path, locale):
    env = environment(LC_ALL=locale, LANG=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    place = tmp_path / "données Ω 日本"
    place.mkdir()
    (place / "évaluations.csv").write_text(
        "".join(f"usér{k % 40},objet№{k % 23},{k % 5 + 1},{k}\n" for k in range(2000)), encoding="utf-8"
    )
    (place / "pairs.csv").write_text("usér1,objet№2\n", encoding="utf-8")

    def job(name, *flags):
        command = [sys.executable, str(ROOT / f"jobs/{name}.py"), *flags]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, timeout=300)
        assert done.returncode == 0, (name, done.stdout.decode(), done.stderr.decode())
        assert b"\\u" not in done.stdout and b"\\x" not in done.stdout
        return done.stdout.decode()

    job("prepare", "évaluations.csv", "--out", "jeu de données")
    job("plan", "--data", "jeu de données", "--ranks", "1")
    job("train", "--data", "jeu de données", "--run-dir", "éxécution", *FLAGS, "--epochs=1")
    assert "éxécution" in job("evaluate", "éxécution", "--out", "comparaison é.json", "--html", "é.html")
    job("recommend", "--run-dir", "éxécution", "--out", "é.csv")
    job("predict", "pairs.csv", "--run-dir", "éxécution", "--out", "prédit.csv")
    job("export", "--run-dir", "éxécution", "--format", "parquet", "--out", "vecteurs é")
    job("checkpoint", "ls", "éxécution")
    job("synthesize", "--preset", "electronics", "--rows", "1000", "--out", "synthétique.csv")
    assert "objet№" in (place / "é.csv").read_text(encoding="utf-8")


def test_a_path_of_other_letters_in_an_ascii_locale(data, tmp_path):
    place = tmp_path / "données Ω"
    shutil.copytree(data, place / "é")
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = launch(1, str(ROOT / "jobs/train.py"), "--data", "é", "--run-dir", "ré", *FLAGS, "--epochs=1")
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, timeout=240)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert (place / "ré/report.json").exists()
    assert json.loads((place / "ré/run.json").read_text())["dataset"]["path"] == "../é"


# Names and ports ----------------------------------------------------------------------------------

WORLD = """
import os, pathlib
from mfdist.cluster.world import World

def listening(pid):
    sockets = set()
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(link))
        except OSError:
            continue
    found = []
    for kind in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.append(words[1].split(":")[0])
    return found

with World.open("cpu") as world:
    assert world.sum([1.0])[0] == world.size
    world.barrier()
    line = " ".join(["listens", *listening(os.getpid()), *listening(os.getppid())])
    os.write(1, f"{line}\\n".encode())  # in one piece: the ranks have one pipe
    world.barrier()
"""
LOOPBACK = "0100007F"


def listened(text):
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("listens")]
    return lines, {address for line in lines for address in line}


@pytest.mark.parametrize(
    "flags", [(), ("--standalone",), ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29411", "--rdzv-id=one")]
)
def test_ranks_of_one_host_listen_on_the_loopback_device_alone(tmp_path, flags):
    (tmp_path / "world.py").write_text(WORLD)
    env = environment(PYTHONPATH=str(ROOT))
    env.pop("GLOO_SOCKET_IFNAME", None)
    done = subprocess.run([*launch(2, *flags), "world.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines, addresses = listened(done.stdout)
    assert (done.returncode, len(lines), addresses) == (0, 2, {LOOPBACK}), done.stdout + done.stderr


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare, for a host's name")
def test_one_host_needs_no_name(tmp_path):
    (tmp_path / "world.py").write_text(WORLD)
    env = environment(PYTHONPATH=str(ROOT))
    env.pop("GLOO_SOCKET_IFNAME", None)
    inner = f"hostname no-such-name.invalid && exec {' '.join(launch(2))} world.py"
    command = ["unshare", "--uts", "sh", "-c", inner]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and len(listened(done.stdout)[0]) == 2, done.stdout + done.stderr


def test_several_hosts_say_which_name_does_not_resolve(monkeypatch, tmp_path, capsys):
    from mfdist.cluster.launch import main

    monkeypatch.setattr(meeting, "NAMES_SECONDS", 0.0)
    flags = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=no-such-host.invalid:29400", "script.py"]
    assert exit_code_of(lambda: main(flags)) == 1
    assert "the rendezvous' host no-such-host.invalid does not resolve" in capsys.readouterr().err
    monkeypatch.setattr(meeting.socket, "getfqdn", lambda: "no-such-name.invalid")
    flags[2] = "--rdzv-endpoint=127.0.0.1:29400"
    assert exit_code_of(lambda: main(flags)) == 1
    assert "the name of this host" in capsys.readouterr().err
    for name, value in {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MfdistError, match=r"the host of rank 0, no-such-host.invalid, does not resolve"):
        meeting.store_of_ranks(1, 2, meeting.timedelta(seconds=1))


ENDING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from mfdist import process

class Abort:
    def __del__(self):
        Path("taken-down").touch()

kept = Abort()
pool = ThreadPoolExecutor(1)
pool.submit(time.sleep, 0.2)
threading.Thread(target=lambda: (time.sleep(0.3), Path("thread").touch())).start()
atexit.register(lambda: Path("atexit").touch())
sys.stdout.write("the last word")
process.end(75)
"""


def ended(program, folder, **streams):
    variables = environment(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="")
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=folder, env=variables, stderr=subprocess.PIPE, **streams
    )


def test_a_program_ends_with_its_code_its_threads_and_its_last_words(tmp_path):
    program = ended(ENDING, tmp_path, stdout=subprocess.PIPE)
    assert program.communicate(timeout=60) == (b"the last word", b"") and program.returncode == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atexit", "thread"]


def test_a_program_whose_reader_has_gone_ends_with_its_code(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    text = "import sys; from mfdist import process; sys.stdout.write('x'); process.end(3)"
    program = ended(text, tmp_path, stdout=writing)
    os.close(writing)
    assert program.communicate(timeout=60)[1] == b"" and program.returncode == 3

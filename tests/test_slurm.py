"""The Slurm scripts: well formed, and run on a real Slurm of one node (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import make_dataset
from slurm_cluster import Cluster, Missing

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts/slurm"
TRAIN = ["--emb-dim", "8", "--epochs", "4", "--batch-size", "64", "--device", "cpu", "--lr", "0.01"]


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_train_asks_for_what_its_loop_relies_on() -> None:
    text = (SCRIPTS / "train.sbatch").read_text()
    for option in ("--requeue", "--open-mode=append", "--signal=B:USR1@180", "--ntasks-per-node=1"):
        assert f"#SBATCH {option}\n" in text


def fake_slurm(folder: Path, code: int) -> dict[str, str]:
    """An environment in which srun ends with ``code`` and every call is noted."""
    for name, body in {
        "srun": f'echo "srun $*" >> {folder}/calls; exit {code}',
        "scontrol": f'echo "scontrol $*" >> {folder}/calls; [ "$1" != show ] || echo node7',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "RUN": str(folder / "run"), "SLURM_JOB_ID": "12", "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "node[7-9]", "MFDIST_PYTHON": "py",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(75, 0, True), (75, 20, False), (138, 0, True), (143, 0, True), (143, 20, False), (0, 0, False), (1, 0, False),
     (2, 0, False)],
)  # fmt: skip
def test_only_a_stop_by_request_is_requeued_and_that_not_for_ever(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    env = fake_slurm(tmp_path, code) | {"SLURM_RESTART_COUNT": str(restarts)}
    result = subprocess.run(["bash", str(SCRIPTS / "train.sbatch"), "--data", "d"], env=env, cwd=tmp_path)
    calls = (tmp_path / "calls").read_text()
    assert result.returncode == code
    assert ("scontrol requeue 12" in calls) == requeued
    assert "--nnodes=3" in calls and f"--rdzv-id=12-{restarts}" in calls and "--rdzv-endpoint=node7:20012" in calls
    assert calls.rstrip().split("\n")[1].endswith(f"jobs/train.py --run-dir {tmp_path}/run --data d")


def test_without_the_head_node_nothing_starts(tmp_path: Path) -> None:
    env = fake_slurm(tmp_path, 0)
    (tmp_path / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    result = subprocess.run(["bash", str(SCRIPTS / "train.sbatch")], env=env, cwd=tmp_path)
    assert result.returncode == 2
    assert not (tmp_path / "calls").exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        started = Cluster(tmp_path_factory.mktemp("slurm"))
    except Missing as reason:
        pytest.skip(str(reason))
    yield started
    started.stop()


def submit(cluster: Cluster, folder: Path, run: Path, *flags: str, options: tuple[str, ...] = ()) -> str:
    return cluster.run(
        "sbatch", "--parsable", f"--chdir={ROOT}", f"--output={folder}/%x-%j.out", "--cpus-per-task=2", *options,
        str(SCRIPTS / "train.sbatch"), *flags, RUN=str(run), MFDIST_PYTHON=sys.executable, NPROC="2",
    )  # fmt: skip


@pytest.mark.slow
def test_warning_checkpoint_75_requeue_completed_and_equal(cluster: Cluster, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", rows=40_000, val_rows=4_000, lanes=4).path
    flags = ["--data", data, *TRAIN, "--checkpoint-every", "100"]
    plain = submit(cluster, tmp_path, tmp_path / "plain", *flags)
    assert cluster.wait_for_end(plain)["JobState"] == "COMPLETED"
    run = tmp_path / "stopped"
    job = submit(cluster, tmp_path, run, *flags)
    cluster.wait_for(lambda: list(run.glob("checkpoints/*/COMMIT")), 120, "first checkpoint")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    end = cluster.wait_for_end(job)
    log = (tmp_path / f"mfdist-train-{job}.out").read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log
    assert "USR1 received" in log and "queued again" in log
    reports = [json.loads((path / "report.json").read_text()) for path in (tmp_path / "plain", run)]
    assert reports[0]["final"] == reports[1]["final"]


@pytest.mark.slow
def test_a_failing_configuration_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", rows=1000, lanes=4).path
    job = submit(cluster, tmp_path, tmp_path / "run", "--data", data, "--no-such-flag")
    end = cluster.wait_for_end(job)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0")


@pytest.mark.slow
def test_the_chain_and_its_gate(cluster: Cluster, tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    rows = [f"u{k % 997},i{k * k % 89},{1 + (k % 997 + k * k % 89) % 5}" for k in range(20_000)]
    source.write_text("user_id,item_id,rating\n" + "\n".join(rows) + "\n")
    command = [str(SCRIPTS / "chain"), str(source), str(tmp_path / "data"), str(tmp_path / "runs"), *TRAIN]
    env = cluster.env | {
        "MFDIST_PYTHON": sys.executable, "NPROC": "2", "SBATCH_TRAIN": "--cpus-per-task=2",
        "SBATCH_PREPARE": "--cpus-per-task=2", "SBATCH_OUTPUT": f"{tmp_path}/%x-%j.out",
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    jobs = dict(part.split() for part in done.stdout.strip().split(", "))
    for name in ("prepare", "train", "baseline"):
        end = cluster.wait_for_end(jobs[name])
        assert end["JobState"] == "COMPLETED", (tmp_path / f"mfdist-{name}-{jobs[name]}.out").read_text()
    gate = cluster.wait_for_end(jobs["evaluate"])
    assert gate["ExitCode"] in ("0:0", "5:0")
    runs = json.loads((tmp_path / "runs/comparison.json").read_text())
    assert "advanced" in json.dumps(runs) and "svd" in json.dumps(runs)


@pytest.mark.slow
def test_the_spark_cluster_of_a_job_begins_and_ends_with_it(tmp_path: Path) -> None:
    """The script with a Slurm that only starts programs: one node, a master and a worker that know the secret."""
    from spark_runs import content, ended, skip_where_missing

    skip_where_missing()
    env = fake_slurm(tmp_path, 0) | {"MFDIST_PYTHON": sys.executable, "EXECUTOR_MEMORY": "1g", "DRIVER_MEMORY": "1g"}
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho localhost\n")
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SPARK_WORKER_DIR": str(tmp_path / "work"), "PYTHONPATH": str(ROOT),
            "SPARK_LOCAL_IP": "127.0.0.1", "SLURM_CPUS_PER_TASK": "2", "HOME": str(tmp_path)}  # fmt: skip
    source = tmp_path / "ratings.csv"
    source.write_text("".join(f"u{k % 97},i{k % 31},{k % 5 + 1},{k}\n" for k in range(3000)))
    flags = [str(source), "--lanes", "3", "--out"]
    command = ["bash", str(SCRIPTS / "prepare-spark.sbatch"), *flags, str(tmp_path / "spark/d")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ended([*flags, str(tmp_path / "one/d")])[0] == 0
    assert content(tmp_path / "spark") == content(tmp_path / "one")
    assert not list(tmp_path.glob(".mfdist-spark-*"))
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


@pytest.mark.slow
@pytest.mark.parametrize("end", ["done", "refused", "cancelled"])
def test_prepare_on_a_spark_cluster_of_the_allocation(cluster: Cluster, tmp_path: Path, end: str) -> None:
    """The dataset of one machine; on every way out no process and no file of the cluster is left."""
    import psutil
    from spark_runs import content, ended, skip_where_missing

    skip_where_missing()
    source = tmp_path / "ratings.csv"
    source.write_text("".join(f"u{k % 97},i{k % 31},{k % 5 + 1},{k}\n" for k in range(3000)))
    flags = ["--lanes", "3"] if end != "refused" else ["--min-user-ratings", "999"]
    job = cluster.run(
        "sbatch", "--parsable", f"--chdir={ROOT}", f"--output={tmp_path}/log", "--nodes=1", "--cpus-per-task=2",
        str(SCRIPTS / "prepare-spark.sbatch"), str(source), "--out", str(tmp_path / "spark/d"), *flags,
        MFDIST_PYTHON=sys.executable, EXECUTOR_MEMORY="1g", DRIVER_MEMORY="1g", SPARK_LOCAL_HOSTNAME="localhost",
    )  # fmt: skip
    if end == "cancelled":
        cluster.wait_for(lambda: (tmp_path / "spark/d").exists(), 120, "the beginning of the work")
        cluster.run("scancel", "--batch", "--signal=TERM", job)
    state = cluster.wait_for_end(job)
    log = (tmp_path / "log").read_text()
    assert state["ExitCode"].split(":")[0] == {"done": "0", "refused": "3", "cancelled": "143"}[end], log
    if end == "done":
        assert ended([str(source), *flags, "--out", str(tmp_path / "one/d")])[0] == 0
        assert content(tmp_path / "spark") == content(tmp_path / "one")
    else:
        assert not (tmp_path / "spark/d/dataset.json").exists()
    assert not list(ROOT.glob(".mfdist-spark-*"))
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if "spark.deploy" in line]

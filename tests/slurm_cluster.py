"""A real Slurm of one node on this machine, from Debian's packages unpacked into a folder; nothing is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = "libhwloc15 liblua5.1-0 libmunge2 munge slurm-wlm-basic-plugins slurm-client slurmctld slurmd".split()
CONF = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
PluginDir={root}/usr/lib/x86_64-linux-gnu/slurm-wlm
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmctldPort={port}
SlurmdPort={node_port}
KillWait=20
JobRequeue=1
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class Missing(Exception):
    """Slurm cannot be had here; the message names what is needed."""


class Cluster:
    """Started on creation; ``stop`` ends the daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, unpacked(folder)
        self.host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        port, node_port = free_port(), free_port()
        conf = CONF.format(host=self.host, root=self.root, folder=folder, port=port, node_port=node_port)
        (folder / "slurm.conf").write_text(conf)
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries}/slurm-wlm",
            "PATH": f"{self.root}/usr/bin:{self.root}/usr/sbin:{os.environ['PATH']}",
        }
        self.run("slurmctld-wlm", "-c")
        self.run("slurmd-wlm", "-d", f"{self.root}/usr/sbin/slurmstepd-wlm")
        self.wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t"), 60, "an idle node")

    def run(self, *command: str, **env: str) -> str:
        result = subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by key."""
        text = self.run("scontrol", "show", "job", number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for_end(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is over for good; a requeued one is started at once instead of two minutes later."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        def over() -> bool:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                subprocess.run(["scontrol", "update", f"jobid={number}", "StartTime=now"], env=self.env, check=False)
            return job["JobState"] in ended

        self.wait_for(over, seconds, f"the end of job {number}")
        return self.job(number)

    def wait_for(self, ready: Any, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"no {what} after {seconds} s\n{self.run('squeue')}"
            time.sleep(0.5)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.env, check=False, timeout=30)
        for name in ("slurmd", "slurmctld"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        time.sleep(1)


def unpacked(folder: Path) -> Path:
    """The packages' files; MFDIST_SLURM_PACKAGES names a folder that holds the .deb files already."""
    if not (shutil.which("dpkg") and shutil.which("apt-get")):
        raise Missing("needs Debian's slurmctld and slurmd: no apt-get or dpkg here")
    if os.getuid() != 0:
        raise Missing("needs root, as which the daemons run")
    given = os.environ.get("MFDIST_SLURM_PACKAGES")
    packages = Path(given) if given else folder / "packages"
    if not given:
        packages.mkdir()
        command = ["apt-get", "download", "-qq", *PACKAGES]
        done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise Missing("needs Debian's slurmctld and slurmd: apt-get download failed; run apt-get update")
    root = folder / "root"
    for path in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(path), str(root)], check=True, timeout=60)
    return root


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

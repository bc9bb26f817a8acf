"""Pods as Kubernetes would make them from a Job's manifest, in network namespaces of this machine.

Each pod has its own network stack and address on one bridge, the host name ``<job>-<index>``, and an ``/etc/hosts``
that resolves ``<job>-<index>.<service>`` to every pod. The small controller follows the Job's own podFailurePolicy.
Mount paths of the manifest are replaced by folders of the test, because the host's root directory is shared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from manifests import Manifest, containers, env_of, pod_spec

ROOT = Path(__file__).parents[1]


def missing() -> str | None:
    """Why pods cannot be made here, or None."""
    if os.getuid() != 0:
        return "needs root, to make network namespaces"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "needs the packages iproute2 and util-linux"
    probe = subprocess.run(["ip", "netns", "add", f"mfprobe{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"network namespaces cannot be made here: {probe.stderr.strip()}"
    ip("netns", "del", f"mfprobe{os.getpid()}")
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Pods:
    """The pods of one Indexed Job. ``places``: mount path -> folder here."""

    job: Manifest
    places: dict[str, str]
    folder: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    codes: list[tuple[int, int]] = field(default_factory=list)  # (index, exit code) of every pod that ended
    failures: int = 0

    @property
    def size(self) -> int:
        return int(self.job["spec"]["completions"])

    def namespace(self, index: int) -> str:
        return f"mfpod{os.getpid()}-{index}"

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        bridge = f"mfb{os.getpid()}"
        name, service = self.job["metadata"]["name"], pod_spec(self.job)["subdomain"]
        hosts = ["127.0.0.1 localhost"]
        for index in range(self.size):
            full = f"{name}-{index}.{service}"
            hosts.append(f"10.77.0.{index + 1} {full}.default.svc.cluster.local {full} {name}-{index}")
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
            for index in range(self.size):
                self._join(index, bridge, hosts)
            yield
        finally:
            for index in range(self.size):
                self.kill(index)
                subprocess.run(["ip", "netns", "del", self.namespace(index)], capture_output=True, check=False)
                shutil.rmtree(f"/etc/netns/{self.namespace(index)}", ignore_errors=True)
            subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)

    def _join(self, index: int, bridge: str, hosts: list[str]) -> None:
        space, link = self.namespace(index), f"mfv{os.getpid()}-{index}"
        etc = Path(f"/etc/netns/{space}")  # `ip netns exec` mounts what lies here over /etc
        etc.mkdir(parents=True)
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", bridge, "up")
        for words in (["addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"]):  # fmt: skip
            ip("-n", space, *words)

    def start(self, index: int) -> None:
        container = containers(self.job)[0]
        command = [self._here(word) for word in [*container["command"], *container["args"]]]
        command[0] = sys.executable if command[0] == "python" else command[0]
        env = {name: self._here(value) for name, value in env_of(container).items()}
        env |= {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index), "OMP_NUM_THREADS": "1"}
        host = f"{self.job['metadata']['name']}-{index}"
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh", host, *command]
        with open(self.folder / f"pod-{index}.log", "ab") as log:
            self.processes[index] = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(index), *inside], cwd=ROOT, env=env, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.starts[index] = self.starts.get(index, 0) + 1

    def kill(self, index: int) -> None:
        """SIGKILL to every process of the pod, as when its node is lost; also from beside :meth:`control`, which may
        have replaced the pod by the time that this returns."""
        process = self.processes.get(index)
        found = subprocess.run(["ip", "netns", "pids", self.namespace(index)], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if process is not None:
            process.wait()

    def control(self, seconds: float, disrupted: set[int] | None = None) -> str:
        """Start and replace pods until the job is "Complete" or "Failed"; pods in ``disrupted`` died of no fault."""
        end, done = time.monotonic() + seconds, set[int]()
        disrupted = disrupted if disrupted is not None else set()
        while len(done) < self.size:
            assert time.monotonic() < end, f"the job is not over after {seconds} s: {self.codes}"
            for index in set(range(self.size)) - done:
                process = self.processes.get(index)
                if process is None:
                    self.start(index)
                elif (code := process.poll()) is not None:
                    self.codes.append((index, code))
                    del self.processes[index]
                    verdict = "done" if code == 0 else self._verdict(index, code, disrupted)
                    if verdict == "FailJob":
                        return "Failed"
                    if verdict == "done":
                        done.add(index)
            time.sleep(0.1)
        return "Complete"

    def _verdict(self, index: int, code: int, disrupted: set[int]) -> str:
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            if "onPodConditions" in rule and index in disrupted:
                disrupted.discard(index)
                return str(rule["action"])
            if code in rule.get("onExitCodes", {}).get("values", ()):
                return str(rule["action"])
        self.failures += 1
        return "Count" if self.failures <= self.job["spec"]["backoffLimit"] else "FailJob"

    def _here(self, word: str) -> str:
        for mount, place in self.places.items():
            if word == mount or word.startswith(mount + "/"):
                return place + word[len(mount) :]
        return word

"""Kubernetes manifests: rendered as kustomize would, and linted for what a schema cannot see."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from mfdist.process import STOP_SIGNALS

Manifest = dict[str, Any]
BY_REQUEST = {75, *(128 + number for number in STOP_SIGNALS)}
"""What the launcher ends with after a request to stop, with a checkpoint written for it or before there was one."""
MERGE_KEYS = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "name"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization: resources, generated ConfigMaps, patches, images (what is used here)."""
    table = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "configMapGenerator", "generatorOptions", "images", "patches"}
    assert set(table) <= known, f"{folder} uses {set(table) - known}, which this renderer does not know"
    manifests: list[Manifest] = []
    for name in table["resources"]:
        path = folder / name
        manifests += render(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for generator in table.get("configMapGenerator", []):
        data = {name: (folder / name).read_text() for name in generator["files"]}
        if generator.get("behavior") == "merge":
            find(manifests, "ConfigMap", generator["name"])["data"].update(data)
        else:
            metadata = {"name": generator["name"]}
            manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for patch in table.get("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        target = find(manifests, change["kind"], change["metadata"]["name"])
        merged = merge(target, change)
        target.clear()
        target.update(merged)
    for image in table.get("images", []):
        for manifest in manifests:
            for container in containers(manifest):
                if container["image"].split(":")[0] == image["name"]:
                    container["image"] = f"{image['name']}:{image['newTag']}"
    return manifests


def merge(base: Any, change: Any, key: str = "") -> Any:
    """A strategic merge: dicts deep, the lists in ``MERGE_KEYS`` by their key, null removes, the rest replaced."""
    if isinstance(base, dict) and isinstance(change, dict):
        result = copy.deepcopy(base)
        for name, value in change.items():
            if value is None:
                result.pop(name, None)
            else:
                result[name] = merge(result[name], value, name) if name in result else drop_nulls(value)
        return result
    if isinstance(base, list) and isinstance(change, list) and key in MERGE_KEYS:
        by = MERGE_KEYS[key]
        changes = {entry[by]: entry for entry in change}
        result = [merge(entry, changes.pop(entry[by])) if entry[by] in changes else entry for entry in base]
        return copy.deepcopy(result) + [drop_nulls(entry) for entry in changes.values()]
    return copy.deepcopy(change)


def drop_nulls(value: Any) -> Any:
    return {k: drop_nulls(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)


def pod_spec(manifest: Manifest) -> Manifest:
    return manifest["spec"]["template"]["spec"]


def containers(manifest: Manifest) -> list[Manifest]:
    return pod_spec(manifest)["containers"] if manifest["kind"] == "Job" else []


def env_of(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def lint(manifests: list[Manifest]) -> list[str]:
    """Every fault found, as a sentence."""
    faults: list[str] = []
    for job in (m for m in manifests if m["kind"] == "Job"):
        faults += [f"{job['metadata']['name']}: {fault}" for fault in lint_job(job, manifests)]
    return faults


def lint_job(job: Manifest, manifests: list[Manifest]) -> list[str]:
    faults = lint_retries(job) + lint_safety(job) + lint_volumes(job, manifests)
    for container in containers(job):
        faults += lint_resources(container)
    if "mfdist.launch" in containers(job)[0]["command"]:
        faults += lint_ranks(job) + lint_rendezvous(job, manifests) + lint_network(job, manifests)
    return faults


def lint_retries(job: Manifest) -> list[str]:
    spec, pod = job["spec"], pod_spec(job)
    names = {container["name"] for container in pod["containers"]}
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    codes: dict[str, set[int]] = {"Ignore": set(), "FailJob": set()}
    faults = []
    for rule in rules:
        if "onExitCodes" in rule:
            codes[rule["action"]] |= set(rule["onExitCodes"]["values"])
            if rule["onExitCodes"].get("containerName") not in names:
                faults.append("a failure rule names a container that is not there")
    disruption = any(r["action"] == "Ignore" and "DisruptionTarget" in str(r.get("onPodConditions")) for r in rules)
    if not disruption:
        faults.append("an evicted pod counts against backoffLimit")
    if not {2, 3, 4, 5} <= codes["FailJob"]:
        faults.append("exit codes 2, 3, 4 and 5 must fail the job")
    launched = "mfdist.launch" in containers(job)[0]["command"]
    if launched and not BY_REQUEST <= codes["Ignore"]:
        faults.append(f"exit codes {sorted(BY_REQUEST)} must be ignored: each is a stop by request")
    if codes["Ignore"] & (codes["FailJob"] | {0, 1}):
        faults.append("an exit code is ignored that must not be")
    if rules and pod.get("restartPolicy") != "Never":
        faults.append("podFailurePolicy needs restartPolicy Never")
    if rules and spec.get("podReplacementPolicy", "Failed") != "Failed":
        faults.append("podFailurePolicy needs podReplacementPolicy Failed")
    if spec["backoffLimit"] < 3 * spec.get("completions", 1):
        faults.append("backoffLimit is below three pods' worth of each index")
    return faults


def lint_ranks(job: Manifest) -> list[str]:
    spec, container = job["spec"], containers(job)[0]
    env, limits = env_of(container), container["resources"]["limits"]
    faults = []
    if spec.get("completionMode") != "Indexed":
        faults.append("completionMode must be Indexed")
    if not str(spec.get("completions")) == str(spec.get("parallelism")) == env.get("PET_NNODES"):
        faults.append("completions, parallelism and PET_NNODES differ")
    workers = int(env.get("PET_NPROC_PER_NODE", "1"))
    gpus = int(limits.get("nvidia.com/gpu", 0))
    if gpus and gpus != workers:
        faults.append("PET_NPROC_PER_NODE differs from the GPUs")
    if workers > cores(limits["cpu"]):
        faults.append("fewer cores than processes")
    if gpus and "cuda" not in container["image"]:
        faults.append("GPUs with an image that has no CUDA")
    if workers > 1 and not any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"]):
        faults.append("several processes without /dev/shm")
    grace = pod_spec(job).get("terminationGracePeriodSeconds", 30)
    if not grace > int(env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) >= 60:
        faults.append("the grace period must exceed the launcher's time-out, and that 60 s")
    return faults


def lint_rendezvous(job: Manifest, manifests: list[Manifest]) -> list[str]:
    name, pod, env = job["metadata"]["name"], pod_spec(job), env_of(containers(job)[0])
    services = [m for m in manifests if m["kind"] == "Service" and m["metadata"]["name"] == pod.get("subdomain")]
    if not services:
        return ["subdomain names no Service"]
    service = services[0]["spec"]
    host, _, port = env.get("PET_RDZV_ENDPOINT", "").partition(":")
    faults = []
    if env.get("PET_RDZV_BACKEND") != "c10d":
        faults.append("the rendezvous backend must be c10d")
    if host != f"{name}-0.{pod['subdomain']}":
        faults.append("the rendezvous host is not the pod with index 0")
    if port not in {str(entry["port"]) for entry in service["ports"]}:
        faults.append("the rendezvous port is not the Service's")
    if service.get("clusterIP") != "None" or not service.get("publishNotReadyAddresses"):
        faults.append("the Service must be headless and publish addresses that are not ready")
    if service.get("selector") != {"batch.kubernetes.io/job-name": name}:
        faults.append("the Service does not select the job's pods")
    return faults


def lint_network(job: Manifest, manifests: list[Manifest]) -> list[str]:
    """The ranks' ports have no password of their own: only the job's pods may reach them."""
    own = {"podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": job["metadata"]["name"]}}}
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    mine = [spec for spec in policies if spec["podSelector"] == own["podSelector"]]
    if not mine:
        return ["no NetworkPolicy selects the job's pods"]
    if any("Ingress" not in spec.get("policyTypes", []) for spec in mine):
        return ["the NetworkPolicy does not limit who reaches the job's pods"]
    rules = [rule for spec in mine for rule in spec.get("ingress", [])]
    if not any(rule.get("from") == [own] and "ports" not in rule for rule in rules):
        return ["the NetworkPolicy does not let the job's own pods in"]
    return ["the NetworkPolicy lets others in"] if any(rule.get("from") != [own] for rule in rules) else []


def lint_safety(job: Manifest) -> list[str]:
    pod, name = pod_spec(job), job["metadata"]["name"]
    faults = []
    if len(f"{name}-{job['spec'].get('completions', 1) - 1}-xxxxx") > 63 or not re.fullmatch(r"[a-z0-9-]+", name):
        faults.append("the name with index and suffix is no DNS label")
    context = pod.get("securityContext", {})
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        faults.append("the pod may run as root")
    for container in pod["containers"]:
        tag = container["image"].rpartition(":")[2] if ":" in container["image"] else ""
        if tag in ("", "latest"):
            faults.append("the image has no fixed tag")
        own = container.get("securityContext", {})
        if not own.get("readOnlyRootFilesystem") or own.get("allowPrivilegeEscalation") is not False:
            faults.append("the root file system is writable or privileges can grow")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            faults.append("capabilities are kept")
        for key, value in env_of(container).items():
            if value and re.search(r"(?i)key|secret|token|password|credential", key):
                faults.append(f"{key} holds a secret in the manifest")
    return faults


def lint_resources(container: Manifest) -> list[str]:
    requests, limits = container["resources"].get("requests", {}), container["resources"].get("limits", {})
    return [
        f"requests and limits of {name} differ or are missing"
        for name in sorted({"memory", "cpu"} | {n for n in {*requests, *limits} if "/" in n})
        if name not in limits or requests.get(name) != limits[name]
    ]


def lint_volumes(job: Manifest, manifests: list[Manifest]) -> list[str]:
    pod = pod_spec(job)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    config_maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    faults = []
    for container in pod["containers"]:
        writable, files = [], set()
        for mount in container["volumeMounts"]:
            volume = volumes.get(mount["name"])
            if volume is None:
                faults.append(f"{mount['mountPath']} is mounted from no volume")
                continue
            if "configMap" in volume:
                names = config_maps.get(volume["configMap"]["name"])
                if names is None:
                    faults.append("the ConfigMap is not there")
                files |= {f"{mount['mountPath']}/{name}" for name in names or ()}
            else:
                writable.append(mount["mountPath"])
            if mount["mountPath"] == "/dev/shm" and volume.get("emptyDir", {}).get("medium") != "Memory":
                faults.append("/dev/shm is not in memory")
        paths = [arg for arg in container["args"] if arg.startswith("/")] + [env_of(container).get("HOME", "/")]
        for path in paths:
            if path not in files and not any(path == w or path.startswith(w + "/") for w in writable):
                faults.append(f"{path} lies on no volume")
    return faults


def cores(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)

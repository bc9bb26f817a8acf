"""The Kubernetes manifests: valid by schema, right in meaning, and run as pods in network namespaces."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import make_dataset
from manifests import Manifest, containers, env_of, find, lint, lint_safety, pod_spec, render
from pods import Pods, missing

K8S = Path(__file__).parents[1] / "k8s"
KUSTOMIZATIONS = ["train", "overlays/one-gpu-node", "overlays/several-nodes", "overlays/object-store"]
PLAIN = ["storage", "prepare", "prepare-spark", "baseline", "evaluate"]


def manifests_of(name: str) -> list[Manifest]:
    return (
        render(K8S / name) if name in KUSTOMIZATIONS else list(yaml.safe_load_all((K8S / f"{name}.yaml").read_text()))
    )


@pytest.mark.parametrize("version", ["1.33", "1.37"])
@pytest.mark.parametrize("name", KUSTOMIZATIONS + PLAIN)
def test_schema(name: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for manifest in manifests_of(name):
        validate.validate(manifest, version, strict=True)


def test_the_schema_check_catches_a_misspelt_key() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    job = find(manifests_of("train"), "Job", "mfdist-train")
    job["spec"]["podReplacmentPolicy"] = "Failed"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.33", strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS + PLAIN)
def test_meaning(name: str) -> None:
    assert lint(manifests_of(name)) == []


def set_env(name: str, value: str) -> Callable[[Manifest, Manifest, Manifest], Any]:
    def change(job: Manifest, service: Manifest, container: Manifest) -> None:
        next(entry for entry in container["env"] if entry["name"] == name)["value"] = value

    return change


def rules(job: Manifest) -> list[Manifest]:
    return job["spec"]["podFailurePolicy"]["rules"]


BREAKS: dict[str, tuple[Callable[[Manifest, Manifest, Manifest], Any], str]] = {
    "restart policy": (lambda j, s, c: pod_spec(j).update(restartPolicy="OnFailure"), "restartPolicy"),
    "replacement": (lambda j, s, c: j["spec"].update(podReplacementPolicy="TerminatingOrFailed"), "ReplacementPolicy"),
    "75 counted": (lambda j, s, c: rules(j).pop(1), "75"),
    "143 counted": (lambda j, s, c: rules(j)[1]["onExitCodes"]["values"].remove(143), "stop by request"),
    "3 retried": (lambda j, s, c: rules(j)[2]["onExitCodes"]["values"].remove(3), "must fail"),
    "1 ignored": (lambda j, s, c: rules(j)[1]["onExitCodes"]["values"].append(1), "ignored"),
    "eviction": (lambda j, s, c: rules(j).pop(0), "evicted"),
    "container": (lambda j, s, c: c.update(name="worker"), "container that is not there"),
    "grace": (lambda j, s, c: pod_spec(j).update(terminationGracePeriodSeconds=150), "grace"),
    "time-out": (set_env("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "200"), "grace"),
    "nodes": (set_env("PET_NNODES", "2"), "differ"),
    "completions": (lambda j, s, c: j["spec"].update(completions=4), "differ"),
    "indexed": (lambda j, s, c: j["spec"].update(completionMode="NonIndexed"), "Indexed"),
    "endpoint": (set_env("PET_RDZV_ENDPOINT", "mfdist-train-1.mfdist-train:29400"), "index 0"),
    "backend": (set_env("PET_RDZV_BACKEND", "static"), "c10d"),
    "port": (set_env("PET_RDZV_ENDPOINT", "mfdist-train-0.mfdist-train:29500"), "port"),
    "selector": (lambda j, s, c: s["spec"].update(selector={"app": "mfdist"}), "select"),
    "headless": (lambda j, s, c: s["spec"].pop("clusterIP"), "headless"),
    "not ready": (lambda j, s, c: s["spec"].update(publishNotReadyAddresses=False), "not ready"),
    "subdomain": (lambda j, s, c: pod_spec(j).update(subdomain="other"), "no Service"),
    "cores": (set_env("PET_NPROC_PER_NODE", "64"), "cores"),
    "GPUs": (lambda j, s, c: [c["resources"][k].update({"nvidia.com/gpu": "2"}) for k in c["resources"]], "GPUs"),
    "GPU request": (lambda j, s, c: c["resources"]["limits"].update({"nvidia.com/gpu": "4"}), "nvidia.com/gpu differ"),
    "memory": (lambda j, s, c: c["resources"]["requests"].update(memory="1Gi"), "memory"),
    "long name": (lambda j, s, c: j["metadata"].update(name="m" * 60), "DNS"),
    "latest": (lambda j, s, c: c.update(image="mfdist:latest"), "tag"),
    "no tag": (lambda j, s, c: c.update(image="mfdist"), "tag"),
    "secret": (lambda j, s, c: c["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}), "secret"),
    "root": (lambda j, s, c: pod_spec(j)["securityContext"].pop("runAsNonRoot"), "root"),
    "root disk": (lambda j, s, c: c["securityContext"].update(readOnlyRootFilesystem=False), "writable"),
    "capabilities": (lambda j, s, c: c["securityContext"].pop("capabilities"), "capabilities"),
    "shm": (lambda j, s, c: c["volumeMounts"].pop(2), "/dev/shm"),
    "shm on disk": (lambda j, s, c: pod_spec(j)["volumes"][2]["emptyDir"].pop("medium"), "memory"),
    "no volume": (lambda j, s, c: pod_spec(j)["volumes"].pop(0), "no volume"),
    "config": (lambda j, s, c: c["args"].__setitem__(2, "/etc/mfdist/other.toml"), "no volume"),
    "backoff": (lambda j, s, c: j["spec"].update(backoffLimit=2), "backoffLimit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_lint_catches(name: str) -> None:
    manifests = copy.deepcopy(manifests_of("train"))
    job, service = find(manifests, "Job", "mfdist-train"), find(manifests, "Service", "mfdist-train")
    change, words = BREAKS[name]
    change(job, service, containers(job)[0])
    assert any(words in fault for fault in lint(manifests)), lint(manifests)


def test_overlays_change_what_they_say() -> None:
    gpu = find(manifests_of("overlays/one-gpu-node"), "Job", "mfdist-train")
    assert containers(gpu)[0]["image"] == "mfdist:0.2.0-cuda"
    assert env_of(containers(gpu)[0])["PET_RDZV_BACKEND"] == "c10d"
    store = manifests_of("overlays/object-store")
    assert "s3://" in find(store, "ConfigMap", "mfdist-train")["data"]["train.toml"]
    assert find(store, "Job", "mfdist-train")["spec"]["completions"] == 3
    assert not any("persistentVolumeClaim" in v for v in pod_spec(find(store, "Job", "mfdist-train"))["volumes"])


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_mounted_configuration_is_one_that_train_takes(name: str, tmp_path: Path) -> None:
    from mfdist.config import read_toml
    from mfdist.training.config import TrainConfig

    path = tmp_path / "train.toml"
    path.write_text(find(manifests_of(name), "ConfigMap", "mfdist-train")["data"]["train.toml"])
    assert read_toml(TrainConfig, str(path))["model"] == "mf_advanced"


def test_image_pins_what_it_installs() -> None:
    text = (K8S / "Dockerfile").read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+\S*$", text, re.M)
    assert re.search(r"torch==\d", text)
    assert "-c requirements.lock" in text
    pins = (K8S.parent / "scripts/requirements.lock").read_text().splitlines()[1:]
    assert pins and all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower() for pin in pins}
    project = (K8S.parent / "pyproject.toml").read_text()
    needed = re.findall(r'"([\w-]+)>=', project.split("dependencies = [")[1].split("]")[0])
    assert set(needed) - {"torch", "tomli"} <= pinned
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((K8S.parent / name).exists() for name in source.split())


def run_pods(folder: Path, kill: int | None, nproc: str = "1", settings: str = "") -> tuple[Pods, str, Path]:
    """The several-nodes overlay as pods on a small dataset; pod ``kill`` is killed after the first checkpoint."""
    if reason := missing():
        pytest.skip(reason)
    manifests = manifests_of("overlays/several-nodes")
    job = find(manifests, "Job", "mfdist-train")
    set_env("PET_NPROC_PER_NODE", nproc)(job, job, containers(job)[0])
    data, config = folder / "volume", folder / "config"
    make_dataset(data / "dataset", rows=40_000, val_rows=4_000, lanes=8)
    config.mkdir()
    text = find(manifests, "ConfigMap", "mfdist-train")["data"]["train.toml"].replace('"/data/', f'"{data}/')
    text += 'emb-dim = 8\nepochs = 6\nbatch-size = 128\nlr = 0.01\ndevice = "cpu"\n' + settings
    (config / "train.toml").write_text(text.replace('checkpoint-every = "10m"', 'checkpoint-every = "100"'))
    (folder / "tmp").mkdir()
    pods = Pods(job, {"/data": str(data), "/etc/mfdist": str(config), "/tmp": str(folder / "tmp")}, folder)
    run = data / "runs/advanced"
    disrupted: set[int] = set()

    def killer() -> None:
        while not list(run.glob("checkpoints/*/COMMIT")) and not over.is_set():
            over.wait(0.05)
        disrupted.add(kill)
        pods.kill(kill)

    over = threading.Event()
    thread = threading.Thread(target=killer)
    with pods.network():
        if kill is not None:
            thread.start()
        try:
            verdict = pods.control(900, disrupted)
        finally:
            over.set()
            if kill is not None:
                thread.join()
    return pods, verdict, run


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_pod_is_replaced_and_the_run_ends_complete_and_correct(tmp_path: Path, victim: int) -> None:
    for name in ("plain", "killed"):
        (tmp_path / name).mkdir()
    _, verdict, plain = run_pods(tmp_path / "plain", None)
    assert verdict == "Complete", logs(tmp_path / "plain")
    pods, verdict, run = run_pods(tmp_path / "killed", victim)
    assert verdict == "Complete", logs(tmp_path / "killed")
    assert pods.starts[victim] >= 2 and (victim, 0) in pods.codes
    reports = [json.loads((path / "report.json").read_text()) for path in (plain, run)]
    assert [report["world_size"] for report in reports] == [3, 3]
    assert reports[0]["final"] == reports[1]["final"]
    errors = [[(epoch["epoch"], epoch["val_rmse"]) for epoch in report["epochs"]] for report in reports]
    assert errors[0] == errors[1]


@pytest.mark.slow
def test_a_bad_configuration_fails_the_job_at_once(tmp_path: Path) -> None:
    pods, verdict, _ = run_pods(tmp_path, None, settings="no-such-key = 1\n")
    assert verdict == "Failed"
    assert pods.codes[0][1] == 2


def logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("pod-*.log")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(kind="Other"), "no NetworkPolicy"),
        (lambda m: m["spec"].update(podSelector={}), "no NetworkPolicy"),
        (lambda m: m["spec"].update(policyTypes=["Egress"]), "does not limit"),
        (lambda m: m["spec"].update(ingress=[]), "own pods in"),
        (lambda m: m["spec"]["ingress"][0].update(ports=[{"port": 29400}]), "own pods in"),
        (lambda m: m["spec"]["ingress"].append({}), "others in"),
    ],
)
def test_lint_catches_a_network_that_is_open(change: Callable[[Manifest], Any], words: str) -> None:
    manifests = copy.deepcopy(manifests_of("train"))
    change(find(manifests, "NetworkPolicy", "mfdist-train"))
    assert any(words in fault for fault in lint(manifests)), lint(manifests)


SPARK = "mfdist-prepare-spark"


def spark_settings() -> dict[str, str]:
    data = find(manifests_of("prepare-spark"), "ConfigMap", SPARK)["data"]
    return dict(line.split(None, 1) for line in data["spark-defaults.conf"].splitlines())


def executor_pod() -> Manifest:
    return yaml.safe_load(find(manifests_of("prepare-spark"), "ConfigMap", SPARK)["data"]["executor.yaml"])


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_the_template_of_executors_is_valid(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    validate.validate(executor_pod(), version, strict=True)


def test_executors_are_as_safe_as_the_driver_and_see_the_same_data() -> None:
    job = find(manifests_of("prepare-spark"), "Job", SPARK)
    pod, driver = executor_pod()["spec"], pod_spec(job)
    executor = {**job, "spec": {**job["spec"], "template": {"spec": pod}}}
    assert lint_safety(executor) == []
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"] == driver["securityContext"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["data"] == next(v for v in driver["volumes"] if v["name"] == "data")
    assert all(m in driver["containers"][0]["volumeMounts"] for m in pod["containers"][0]["volumeMounts"])
    assert pod["containers"][0]["workingDir"] == "/tmp" and "emptyDir" in volumes["tmp"]


def test_sparks_driver_is_found_by_its_service_and_may_work_with_pods_alone() -> None:
    manifests, settings = manifests_of("prepare-spark"), spark_settings()
    service = find(manifests, "Service", SPARK)["spec"]
    assert settings["spark.driver.host"] == SPARK and service["clusterIP"] == "None"
    assert service["selector"] == {"batch.kubernetes.io/job-name": SPARK}
    ports = {str(entry["port"]) for entry in service["ports"]}
    assert ports == {settings["spark.driver.port"], settings["spark.driver.blockManager.port"]}
    (rule,) = find(manifests, "Role", SPARK)["rules"]
    assert (rule["apiGroups"], rule["resources"]) == ([""], ["pods"]) and "*" not in rule["verbs"]
    binding = find(manifests, "RoleBinding", SPARK)
    assert binding["roleRef"]["name"] == binding["subjects"][0]["name"] == SPARK
    job = find(manifests, "Job", SPARK)
    assert pod_spec(job)["serviceAccountName"] == SPARK
    labels = find(manifests, "NetworkPolicy", SPARK)["spec"]["podSelector"]["matchLabels"]
    assert labels == job["spec"]["template"]["metadata"]["labels"]
    assert settings["spark.kubernetes.executor.label.app.kubernetes.io/name"] == labels["app.kubernetes.io/name"]
    assert settings["spark.authenticate"] == "true"


def test_an_executor_has_memory_for_the_tasks_that_it_runs_at_once() -> None:
    from mfdist.config import parse_bytes, parse_config
    from mfdist.prepare.config import PrepareConfig

    settings = spark_settings()
    args = containers(find(manifests_of("prepare-spark"), "Job", SPARK))[0]["args"]
    config = parse_config(PrepareConfig, args, "test")
    beside = parse_bytes(settings["spark.executor.memoryOverhead"].replace("g", "GiB"))
    assert config.engine == "spark" and beside >= int(settings["spark.executor.cores"]) * config.memory * 1.25
    assert settings["spark.kubernetes.executor.limit.cores"] == settings["spark.executor.cores"]
    assert executor_pod()["spec"]["containers"][0]["image"] == settings["spark.kubernetes.container.image"]

"""The set-up: made once, finished after an interruption, quick when there is nothing to do. reproduce, bench_scale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# A python3 that notes what it is asked to do and makes a .venv with itself as the interpreter.
FAKE = """#!/bin/bash
log={folder}/calls
case "$*" in
  *importlib.metadata*) echo 2.13.0+cpu ;;
  -c*) echo "${{FAKE_VERSION:-3.12}}" ;;
  "-m venv"*) echo venv >> $log; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *jobs/compile.py*) touch {folder}/compiled ;;
  *"pip --version"*) [ -f {folder}/fake.py3 ] && exit 0 ;;
  *"pip install"*)
    words="${{*:6}}"
    echo "install ${{words//\\/dev\\/fd\\/*/REST}}" >> $log
    [ ! -f {folder}/break ] || exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in ("scripts/setup", "scripts/requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    fake = folder / "fake.py3"
    fake.write_text(FAKE.format(folder=folder))
    fake.chmod(0o755)
    return folder


def set_up(checkout: Path, **env: str) -> tuple[int, list[str]]:
    """Exit code of scripts/setup, and what the fake interpreter was asked to do in this run."""
    calls = checkout / "calls"
    calls.write_text("")
    result = subprocess.run(
        [str(checkout / "scripts/setup")], cwd="/", capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(checkout / "fake.py3"), **env},
    )  # fmt: skip
    return result.returncode, calls.read_text().splitlines()


LOCKED = {line.split("==")[0]: line for line in (ROOT / "scripts/requirements.lock").read_text().splitlines()[1:]}
INSTALLS = [
    f"install --no-deps {LOCKED['scikit-surprise']}", "install -c scripts/requirements.lock torch==2.13.0",
    "install --no-deps -r REST", "install --no-deps --no-build-isolation -e .",
]  # fmt: skip


def test_locked_versions_are_installed_once(checkout: Path) -> None:
    code, calls = set_up(checkout)
    assert code == 0 and calls[0] == "venv" and sorted(calls[1:]) == sorted(INSTALLS)
    assert set_up(checkout) == (0, [])


def test_kernels_are_compiled_behind_the_set_up(checkout: Path) -> None:
    set_up(checkout)
    for _ in range(1000):  # it is at the lowest priority
        if (checkout / "compiled").exists():
            break
        time.sleep(0.1)
    assert (checkout / "compiled").exists() and (checkout / ".venv/kernels.log").exists()


def test_an_interrupted_set_up_is_finished(checkout: Path) -> None:
    (checkout / "break").touch()
    code, calls = set_up(checkout)
    assert code != 0 and INSTALLS[3] not in calls
    (checkout / "break").unlink()
    code, calls = set_up(checkout)
    assert code == 0 and sorted(calls) == sorted(INSTALLS)


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/requirements.lock"])
def test_a_changed_file_installs_again(checkout: Path, name: str) -> None:
    set_up(checkout)
    with open(checkout / name, "a") as file:
        file.write("# changed\n")
    assert sorted(set_up(checkout)[1]) == sorted(INSTALLS)


def test_python_310_looks_for_versions(checkout: Path) -> None:
    assert set_up(checkout, FAKE_VERSION="3.10") == (
        0, ["venv", "install torch==2.13.0", "install torch==2.13.0+cpu -e .[test]"],
    )  # fmt: skip


@pytest.mark.parametrize("version", ["2.7", "3.9"])
def test_an_old_python_is_refused(checkout: Path, version: str) -> None:
    assert set_up(checkout, FAKE_VERSION=version) == (2, [])


def test_the_lock_has_what_the_package_needs() -> None:
    """Each dependency that pyproject.toml names, extras of the tests included, at a version that its range admits."""
    from packaging.requirements import Requirement

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [
        Requirement(text) for text in project["dependencies"] + extras["test"] + extras["s3"] + extras["baseline"]
    ]
    pins = {name.lower(): line.split("==")[1].split(";")[0] for name, line in LOCKED.items()}
    for one in needed:
        if one.name not in ("torch", "tomli", "mfdist"):
            assert one.specifier.contains(pins[one.name.lower()]), one


@pytest.mark.parametrize(
    "name", ["scripts/setup", "scripts/lock", "scripts/quickstart", "scripts/reproduce", "scripts/test", ".ci/run"]
)
def test_syntax_and_mode(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert os.access(ROOT / name, os.X_OK)


def test_no_registry_host_in_any_file() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        text = (ROOT / name).read_text(errors="replace") if (ROOT / name).is_file() else ""
        for host in ("pypi" + ".org", "download.py" + "torch.org", "--extra-" + "index-url", "docker" + ".io"):
            assert host not in text, f"{name} names {host}"


# The vignette's numbers ---------------------------------------------------------------------------

sys.path.insert(0, str(ROOT / "scripts"))


def reports_like_the_vignette() -> dict[str, Any]:
    """What the runs' reports would hold if every number came out as it was printed."""

    def epochs(train: list[float], val: list[float]) -> dict[str, Any]:
        return {"epochs": [{"train_rmse": t, "val_rmse": v} for t, v in zip(train, val, strict=True)]}

    train = [6.8, 5.6, 4.7, 4.1, 3.5, 3.1, 2.7, 2.3, 2.0, 1.7]
    advanced = [1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.8, 0.7]
    return {
        "mf": epochs(train, [6.5, 6.1, 5.8, 5.7, 5.6, 5.5, 5.5, 5.5, 5.5, 5.5]),
        "mf_advanced": epochs(advanced, [1.4, 1.3, 1.3, 1.3, 1.3, 1.3, 1.4, 1.4, 1.4, 1.4]),
        "svd": {"final": {"val_rmse_clipped": 1.2943, "val_mae_clipped": 1.0190}},
        "data": {
            "num_users": 4_201_696, "num_items": 476_002,
            "rating_histogram": [[1.0, 901_765], [2.0, 456_322], [3.0, 633_073], [4.0, 1_485_781], [5.0, 4_347_541]],
        },
    }  # fmt: skip


def verdicts(reports: dict[str, Any], synthetic: bool = False, judged: bool = True) -> dict[tuple[str, str], str]:
    import vignette

    return {(entry.of, entry.what): entry.verdict for entry in vignette.check(reports, synthetic, judged)}


def test_the_vignette_passes_its_own_numbers() -> None:
    assert set(verdicts(reports_like_the_vignette()).values()) == {"pass"}


def change(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    reports: Any = reports_like_the_vignette()
    place = reports
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return reports


@pytest.mark.parametrize(
    ("path", "inside", "outside"),
    [
        (("svd", "final", "val_rmse_clipped"), 1.2967, 1.2969),  # 0.0025 is wider than the printed precision
        (("svd", "final", "val_mae_clipped"), 1.0166, 1.0164),
        (("mf", "epochs", 9, "val_rmse"), 5.549, 5.56),  # one printed decimal
        (("mf", "epochs", 0, "train_rmse"), 6.61, 6.59),  # a training curve
        (("mf_advanced", "epochs", 3, "val_rmse"), 1.26, 1.36),
        (("data", "num_users"), 4_201_696, 4_201_695),
    ],
)
def test_a_number_passes_within_its_precision_and_fails_beyond(path: Any, inside: float, outside: float) -> None:
    assert "FAIL" not in verdicts(change(path, inside)).values()
    assert list(verdicts(change(path, outside)).values()).count("FAIL") == 1


def test_a_curve_that_never_rises_again_fails() -> None:
    reports = reports_like_the_vignette()
    for epoch in reports["mf_advanced"]["epochs"][6:]:
        epoch["val_rmse"] = 1.3
    failed = {what for (_, what), verdict in verdicts(reports).items() if verdict == "FAIL"}
    assert failed == {"validation RMSE, epoch 9", "rise from the best to the last"}


def test_on_the_twin_only_its_claims_are_judged() -> None:
    reports = change(("svd", "final", "val_mae_clipped"), 1.0050)  # allowed there, not on the file
    reports["mf_advanced"]["epochs"][5]["val_rmse"] = 1.3641  # not claimed there
    assert list(verdicts(reports).values()).count("FAIL") == 2
    assert "FAIL" not in verdicts(reports, synthetic=True).values()
    reports["svd"]["final"]["val_rmse_clipped"] = 1.31
    assert verdicts(reports, synthetic=True)["svd", "validation RMSE"] == "FAIL"


def test_a_quick_run_judges_nothing() -> None:
    reports = reports_like_the_vignette()
    for name in ("mf", "mf_advanced"):
        del reports[name]["epochs"][2:]
    assert set(verdicts(reports, synthetic=True, judged=False).values()) == {"not claimed"}
    assert "FAIL" in verdicts(reports).values()  # the last epoch is missing


# The steps of scripts/reproduce -------------------------------------------------------------------


def step(name: str, code: str, done: bool = False) -> Any:
    from reproduce import Step

    return Step(name, name, [sys.executable, "-c", code], lambda: done)


def test_a_step_is_measured_and_its_exit_code_passed_on(tmp_path: Path) -> None:
    from reproduce import measurements, run_step

    assert run_step(step("mf", "x = b'1' * 300_000_000; raise SystemExit(75)"), tmp_path) == 75
    first = measurements(tmp_path)["mf"]
    assert first["peak_rss_bytes"] > 300e6 and first["seconds"] > 0  # a child's peak begins with its parent's
    assert run_step(step("mf", "import time; time.sleep(0.3)"), tmp_path) == 0  # goes on: its seconds are added
    both = measurements(tmp_path)["mf"]
    assert both["seconds"] > first["seconds"] + 0.3 and both["peak_rss_bytes"] >= first["peak_rss_bytes"]


def test_what_is_done_is_neither_run_nor_measured_again(tmp_path: Path) -> None:
    from reproduce import measurements, run_step

    assert run_step(step("prepare", "raise SystemExit(1)", done=True), tmp_path) == 0
    (tmp_path / "mf").mkdir()
    (tmp_path / "mf" / "report.json").touch()  # a finished training says so itself, in no time
    assert run_step(step("mf", ""), tmp_path) == 0
    assert measurements(tmp_path) == {}


def test_a_request_to_stop_reaches_the_job(tmp_path: Path) -> None:
    from reproduce import run_step

    job = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); "
    job += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)"
    assert run_step(step("mf", job), tmp_path) == 75


def test_another_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import reproduce

    ratings = tmp_path / "ratings.csv"
    ratings.write_text("u,i,5,1\n")
    flags = reproduce.parse([str(ratings)])
    assert reproduce.find_problem(flags, tmp_path / "out") is None
    assert reproduce.find_problem(flags, tmp_path / "out") is None
    assert "was begun with" in (reproduce.find_problem(reproduce.parse(["twin"]), tmp_path / "out") or "")
    assert reproduce.main([str(tmp_path / "none.csv"), "--out", str(tmp_path / "other")]) == 2
    assert "is not a file" in capsys.readouterr().err and not (tmp_path / "other").exists()


def reproduce_twin(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), "twin", "--quick", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_reproduce_stopped_and_run_again(tmp_path: Path) -> None:
    """All of it on a small twin: stopped in a training, gone on with, and once more with nothing to do."""
    out = tmp_path / "out"
    first = reproduce_twin(out)
    while not (out / "mf" / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    first.terminate()
    text = first.communicate()[0]
    assert first.returncode in {75, 143}, text  # by a checkpoint, or before the job listens
    second = reproduce_twin(out)
    text = second.communicate()[0]
    assert second.returncode == 0 and "done before" in text and "SYNTHETIC" in text, text
    result = json.loads((out / "result.json").read_text())
    assert {entry["verdict"] for entry in result["checks"]} == {"not claimed"}
    assert {"synthesize", "prepare", "mf", "mf_advanced", "svd", "evaluate"} <= set(result["steps"])
    page = (out / "index.html").read_text()
    assert "Synthetic." in page
    assert all(f"Figure {number}" in page for number in (1, 2, 7, 10)) and page.count("<svg") == 6
    written = (out / "mf" / "report.json").stat().st_mtime_ns
    assert reproduce_twin(out).wait() == 0
    assert (out / "mf" / "report.json").stat().st_mtime_ns == written


# scripts/bench_scale.py ---------------------------------------------------------------------------


def test_a_size_has_a_tenth_as_many_users() -> None:
    from bench_scale import Size

    assert Size.parse("200e6") == Size(200_000_000, 20_000_000, 2_000_000)
    assert Size.parse("50e6:20e6:2e6") == Size(50_000_000, 20_000_000, 2_000_000)


@pytest.mark.slow
def test_bench_scale_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench_scale.py"), "--sizes", "1e5", "--ranks", "2", "--wire-batch",
               "8192", "--folder", str(tmp_path / "folder"), "--json", str(tmp_path / "scale.json")]  # fmt: skip
    subprocess.run(command, check=True)
    rows = {row["algorithm"]: row for row in json.loads((tmp_path / "scale.json").read_text())["rows"]}
    assert list(rows) == [
        "synthesize",
        "prepare",
        "train",
        "settle",
        "evaluate",
        "checkpoint",
        "export",
        "wire 8,192 x 2",
    ]
    for name, row in rows.items():
        if not name.startswith("wire"):
            assert row["rows_per_second"] > 0 and 0 < row["peak_rss_bytes"] <= row["bound_bytes"], name
    assert rows["export"]["disk_bytes"] > 11_000 * 33 * 4  # the tables, and the ids beside them
    wire = rows["wire 8,192 x 2"]
    assert wire["row_bytes_per_rating"] < wire["bytes_per_rating"] < 2 * 33 * 4 + 16
    began = time.monotonic()
    assert "wire" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert time.monotonic() - began < 20  # imports, and nothing measured again


# scripts/bench_checkpoint.py ----------------------------------------------------------------------


@pytest.mark.slow
def test_bench_checkpoint_tells_the_pause_from_a_synchronous_one_and_stops_with_75(tmp_path: Path) -> None:
    from datasets import make_dataset

    data = make_dataset(tmp_path / "data", rows=40_000, lanes=4, val_rows=400).path
    command = [sys.executable, str(ROOT / "scripts/bench_checkpoint.py"), "--data", data, "--ranks", "1", "2",
               "--every", "40", "--saves", "3", "--batch-size", "500", "--folder", str(tmp_path), "--json",
               str(tmp_path / "found.json")]  # fmt: skip
    subprocess.run(command, check=True)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert all(row["bytes"] > 100_000 and row["share"] > 0 and 0 < row["sigterm_seconds"] < 60 for row in rows)
    assert sorted(os.listdir(tmp_path)) == ["data", "found.json"]

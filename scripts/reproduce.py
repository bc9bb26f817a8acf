"""The steps of scripts/reproduce: the jobs one after the other, each a program of its own, and what they came to.

OUT/twin.csv            the synthetic file (only of `twin`), its truth beside it
OUT/data                the prepared dataset
OUT/mf, mf_advanced     the vignette's models with its settings; OUT/svd its baseline; OUT/ours our configuration, for
                        a file of that size quick.toml (with --quick recipe.toml)
OUT/comparison.json     all of them on the same validation rows
OUT/result.json         every number with pass or fail, seconds and peak memory of every step
OUT/index.html          the page, the vignette's figures beside ours
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vignette
from vignette import Check

ROOT = Path(__file__).resolve().parents[1]
QUICK_ROWS = 60_000
COMPARISON_NOT_MET, BAD_USAGE = 5, 2
TRAININGS = ("mf", "mf_advanced")
RUNS = (*TRAININGS, "ours", "svd")


@dataclass(frozen=True)
class Step:
    """A program to run, and whether its work is done already."""

    name: str
    what: str
    command: list[str]
    done: Callable[[], bool]


def main(argv: Sequence[str] | None = None) -> int:
    flags = parse(argv)
    out = Path(flags.out or f"runs/reproduce-{'twin' if flags.source == 'twin' else Path(flags.source).stem}").resolve()
    problem = find_problem(flags, out)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return BAD_USAGE
    out.mkdir(parents=True, exist_ok=True)
    synthetic = flags.source == "twin"
    print(f"The vignette on {'a SYNTHETIC twin of its file' if synthetic else flags.source}; everything lies in {out}")
    steps = plan_steps(flags, out)
    for number, step in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {step.what}", flush=True)
        code = run_step(step, out)
        if code:
            print(f"\nstopped: the step '{step.name}' ended with {code}; the same command goes on from here.")
            return code
    checks = write_result(flags, out)
    run_step(Step("page", "", [sys.executable, "scripts/vignette_page.py", str(out)], lambda: False), out)
    print(summary(json.loads((out / "result.json").read_text()), measurements(out)))
    print(f"\npage: {out / 'index.html'}")
    return COMPARISON_NOT_MET if any(entry.verdict == "FAIL" for entry in checks) else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/reproduce", description="The vignette, reproduced and checked.")
    parser.add_argument("source", metavar="FILE|twin", help="ratings_Electronics.csv, or 'twin' for a synthetic one")
    parser.add_argument("--out", help="directory of everything (default runs/reproduce-NAME)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each training (default %(default)s)")
    quick = f"try the machinery: 2 epochs, a twin of {QUICK_ROWS:,} rows; nothing is judged"
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser.parse_args(argv)


def find_problem(flags: argparse.Namespace, out: Path) -> str | None:
    """What is wrong with the command, before any work."""
    source = None if flags.source == "twin" else Path(flags.source).resolve()
    if source and not source.is_file():
        return f"{flags.source} is not a file; give the ratings file, or 'twin' for a synthetic one."
    before = read_json(out / "begun.json")
    begun = {"source": str(source or "twin"), "quick": flags.quick, "bytes": source.stat().st_size if source else 0}
    if before and before != begun:
        return f"{out} was begun with {before['source']}{' --quick' * before['quick']}; choose another --out."
    if not before:
        out.mkdir(parents=True, exist_ok=True)
        (out / "begun.json").write_text(json.dumps(begun))
    return None


def plan_steps(flags: argparse.Namespace, out: Path) -> list[Step]:
    """Everything to run, in order."""
    data = out / "data"
    source = Path(flags.source).resolve() if flags.source != "twin" else out / "twin.csv"
    steps = []
    if flags.source == "twin":
        rows = ["--rows", str(QUICK_ROWS)] if flags.quick else []
        steps.append(Step("synthesize", "A synthetic file like the vignette's",
                          _job("synthesize", "--preset", "electronics", *rows, "--out", source),
                          Path(f"{source}.truth.json").exists))  # fmt: skip
    steps.append(Step("prepare", "Prepare the dataset", _job("prepare", source, "--out", data),
                      (data / "dataset.json").exists))  # fmt: skip
    configs = {"mf": "vignette_mf", "mf_advanced": "vignette_mf_advanced", "ours": "recipe" if flags.quick else "quick"}
    titles = {"mf": "The vignette's model mf", "mf_advanced": "The vignette's model mf_advanced",
              "ours": "Our own configuration for a file of this size"}  # fmt: skip
    for name in RUNS[:-1]:
        command = [*_launcher(flags.ranks), "jobs/train.py", "--data", str(data), "--run-dir", str(out / name),
                   "--config", configs[name], "--keep", "1"]  # fmt: skip
        if name != "ours":  # its settings are the vignette's; how often it saves itself is not one of them
            command += ["--checkpoint-every", "2m"]
        steps.append(Step(name, titles[name], command + ["--epochs", "2"] * flags.quick, lambda: False))
    quick = ["--epochs", "2", "--factors", "20"] * flags.quick
    steps.append(Step("svd", "The vignette's baseline: Surprise's SVD with its defaults",
                      _job("baseline_svd", "--data", data, "--run-dir", out / "svd", *quick),
                      (out / "svd" / "report.json").exists))  # fmt: skip
    compared = [out / name for name in ("ours", "mf_advanced", "svd", "mf")]
    steps.append(Step("evaluate", "All of them on the same validation rows",
                      _job("evaluate", *compared, "--out", out / "comparison.json"), lambda: False))  # fmt: skip
    return steps


def _job(name: str, *words: object) -> list[str]:
    return [sys.executable, f"jobs/{name}.py", *map(str, words)]


def _launcher(ranks: int) -> list[str]:
    launch = ["-m", "mfdist.launch", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch]


# Running ------------------------------------------------------------------------------------------


def run_step(step: Step, out: Path) -> int:
    """Exit code of a step; its seconds and peak memory are added to OUT/steps.json where it did any work."""
    if step.done():
        print("done before")
        return 0
    finished = (out / step.name / "report.json").exists()
    began = time.monotonic()
    with _pass_on_signals() as signals:
        child = signals.start(step.command)
        _, status, usage = os.wait4(child.pid, 0)
    code = child.returncode = os.waitstatus_to_exitcode(status)
    if not finished:
        found = measurements(out)
        before = found.get(step.name, {"seconds": 0.0, "peak_rss_bytes": 0})
        repeated = step.name in ("evaluate", "page")
        found[step.name] = {
            "seconds": time.monotonic() - began + (0.0 if repeated else before["seconds"]),
            "peak_rss_bytes": max(usage.ru_maxrss * 1024, before["peak_rss_bytes"]),
        }
        (out / "steps.json").write_text(json.dumps(found, indent=1) + "\n")
    return code if code >= 0 else 128 - code


class _pass_on_signals:
    """Context: a request to stop reaches the job, which writes its checkpoint; Ctrl-C does so by itself."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}
        self._early: list[int] = []

    def __enter__(self) -> _pass_on_signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._received)
        return self

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """The job; what was asked for before it was there reaches it, too."""
        child = self._child = subprocess.Popen(command, cwd=ROOT)
        for number in self._early:
            child.send_signal(number)
        return child

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            return
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)


def measurements(out: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak_rss_bytes of each step so far."""
    return read_json(out / "steps.json") or {}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


# The result ---------------------------------------------------------------------------------------


def write_result(flags: argparse.Namespace, out: Path) -> list[Check]:
    """Check every number and write OUT/result.json."""
    reports = {name: read_json(out / name / "report.json") for name in RUNS}
    reports["data"] = read_json(out / "data" / "dataset.json")
    checks = vignette.check(reports, flags.source == "twin", judged=not flags.quick)
    truth = read_json(out / "twin.csv.truth.json")
    result = {
        "source": flags.source, "ratings": sum(reports["data"]["num_ratings"].values()), "quick": flags.quick,
        "synthetic": flags.source == "twin", "noise_floor": truth and truth["noise_floor"], "runs": RUNS,
        "checks": [dataclasses.asdict(entry) for entry in checks], "steps": measurements(out),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return checks


def summary(result: dict[str, Any], steps: dict[str, dict[str, float]]) -> str:
    """What the terminal shows at the end."""
    label = "SYNTHETIC ratings: figures of size and speed; accuracy on them says nothing. " * result["synthetic"]
    lines = ["", f"== The vignette's numbers\n{label}".rstrip(), ""]
    lines.append(f"{'':12}{'':32}{'vignette':>11}{'ours':>13}{'allowed':>10}  verdict")
    for entry in result["checks"]:
        verdict = entry["verdict"] + (" (synthetic)" if result["synthetic"] and entry["tolerance"] is not None else "")
        lines.append(f"{entry['of']:12}{entry['what']:32}{number_text(entry['published'], entry['published']):>11}"
                     f"{number_text(entry['ours'], entry['published']):>13}{allowed_text(entry['tolerance']):>10}"
                     f"  {verdict}")  # fmt: skip
    counts = [sum(entry["verdict"] == kind for entry in result["checks"]) for kind in ("pass", "FAIL", "not claimed")]
    lines.append(f"\n{counts[0]} pass, {counts[1]} fail, {counts[2]} not claimed")
    lines += ["", "== What it took", "", f"{'':14}{'seconds':>9}{'peak GiB':>10}"]
    for name, used in steps.items():
        lines.append(f"{name:14}{used['seconds']:9.1f}{used['peak_rss_bytes'] / 2**30:10.2f}")
    total = sum(used["seconds"] for used in steps.values())
    trainings = sum(steps[name]["seconds"] for name in TRAININGS)
    lines.append(f"{'all':14}{total:9.1f}{'':10}  of it the vignette's two trainings {trainings:.1f}")
    return "\n".join(lines)


def number_text(value: float | None, published: float) -> str:
    """Whole numbers with commas, others to four decimals; published ones as they were printed."""
    if value is None:
        return "-"
    if published >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}" if value == published else f"{value:.4f}"


def allowed_text(tolerance: float | None) -> str:
    return "" if tolerance is None else "exact" if tolerance == 0 else f"+-{tolerance:g}"


if __name__ == "__main__":
    sys.exit(main())

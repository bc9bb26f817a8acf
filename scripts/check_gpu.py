"""Everything that only a GPU can show, in one call of at most six minutes.

    scripts/check_gpu --out gpu.json              # on a machine with a CUDA device
    scripts/check_gpu --out small.json --small    # the same programs on a CPU, Triton's kernels in its interpreter

Needs torch, triton, numba, pyarrow, pytest; neither polars, Surprise nor a network. Makes its data itself. Each section
is a process of its own with a time limit, so that one that fails, or leaves the device in a bad state, hides no other:

    kernels     tests/test_gpu_kernels.py, compiled: all optimizers against plain torch and against the CPU's kernels
    adamw       AdamW with gaps against torch.optim.AdamW in float64 on the whole table
    graphs      steps as CUDA graphs, and the same run twice: the same bits
    curves      each ready configuration on the CPU and on the device: training and validation RMSE of each epoch
    resume      a checkpoint of the device continued on the CPU, and one of the CPU on the device
    ranks       two ranks on one device, under gloo
    recommend   top items on the device and on the CPU
    feed        the loader's rows to the device, M rows/s
    speed       training at the Electronics file's size, M ratings/s at batch 65,536 and 1,048,576 of resident batches
                and through the loader, and the share of the measured copy bandwidth

The exit code is 5 where a section failed. --out holds every section's figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
CONFIGS = ("vignette_mf", "vignette_mf_advanced", "svd", "recipe", "ranking")
CURVE_TOLERANCE = 2e-4
"""RMSE: float32 sums in another order, through the epochs of a training."""
TABLE_TOLERANCE = 2e-3
"""Relative RMS of tables after a training that was partly on another device."""
Figures = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU where there is no device")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections only")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds for all sections (default: 360)")
    parser.add_argument("--folder", type=Path, help="where to work; not set: a temporary folder")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    return parser.parse_args()


# Sections -------------------------------------------------------------------------------------------


def kernels(flags: argparse.Namespace, folder: Path) -> Figures:
    """The tests' cases in several processes at once: most of their time is Triton's compilation."""
    tests = ["tests/test_gpu_kernels.py", *([] if flags.small else ["tests/test_gpu_alternating.py"])]
    chosen = ["-k", "test_same_steps"] if flags.small else ["-m", "slow or not slow", "-k", "not compile_for"]
    listed = _pytest("--collect-only", "-q", "-o", "addopts=", *tests, *chosen)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        raise AssertionError(f"no test was collected: {listed.stdout[-2000:]}{listed.stderr[-2000:]}")
    processes = max(1, min(len(names), (os.cpu_count() or 2) - 2))
    parts = [names[k::processes] for k in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(lambda part: _pytest("-q", "-o", "addopts=", *part), parts))
    ends = [one.stdout.strip().splitlines()[-1] if one.stdout.strip() else one.stderr[-300:] for one in done]
    failed = [line for one in done for line in one.stdout.splitlines() if line.startswith("FAILED")]
    failures = "\n".join(one.stdout[-6000:] for one in done if one.returncode)
    return {"ok": not any(one.returncode for one in done), "tests": len(names), "ends": ends, "failed": failed,
            "output": failures[-20000:]}  # fmt: skip


def adamw(flags: argparse.Namespace, folder: Path) -> Figures:
    """Rows with gaps of many lengths against float64 AdamW that steps every row at every step."""
    import torch
    from test_gpu_kernels import gpu_step, model_on

    from mfdist.model.objective import Objective
    from mfdist.model.optimizers import RowOptimizer

    device, users, items, rows, steps = _device(flags), 40, 25, 64, 40 if flags.small else 1500
    optimizer = RowOptimizer(kind="adamw", lr=0.002, weight_decay=0.01, total_steps=steps)
    model = model_on(device, dim=16, bias=True, optimizer=optimizer)
    step = gpu_step(model, optimizer, Objective(), None)
    found: Figures = {}
    tables = {}
    for kind in (torch.float64, torch.float32):
        dense = [
            table.rows.weight.detach().cpu().to(kind).clone().requires_grad_() for table in (model.user, model.item)
        ]
        tables[kind] = dense
    optims = {kind: torch.optim.AdamW(dense, lr=0.002, weight_decay=0.01) for kind, dense in tables.items()}
    generator = torch.Generator().manual_seed(1)
    for now in range(steps):
        batch = rows if now % 3 else 7
        user = (users * torch.rand(batch, generator=generator) ** 3).int()
        item = (items * torch.rand(batch, generator=generator) ** 3).int()
        rating = torch.randint(1, 6, (batch,), generator=generator).float()
        for kind, (u, i) in tables.items():
            p, q = u[user.long()], i[item.long()]
            score = (p[:, :16] * q[:, :16]).sum(1) + p[:, 16] + q[:, 16]
            loss = (0.5 + 5.0 * torch.sigmoid(score) - rating.to(kind)).square().mean()
            optims[kind].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optims[kind].step()
        step(user.to(device), item.to(device), rating.to(device), batch)
    step.settle()
    for name, table, number in (("user", model.user, 0), ("item", model.item, 1)):
        exact = tables[torch.float64][number].detach()
        for what, tensor in (("ours", table.rows.weight.detach().cpu()), ("float32", tables[torch.float32][number])):
            found[f"{name}_{what}"] = float((tensor.detach().double() - exact).norm() / exact.norm())
    ok = all(found[f"{name}_ours"] <= 3 * found[f"{name}_float32"] + 1e-7 for name in ("user", "item"))
    return {"ok": ok, "steps": steps, **found}


def graphs(flags: argparse.Namespace, folder: Path) -> Figures:
    """Whole trainings twice, and with graphs off, must give the same file."""
    data = _builtin(flags, folder)
    hashes = {}
    for name in ("first", "again"):
        _train(data, folder / f"graphs-{name}", "vignette_mf_advanced", _device(flags), flags, "--epochs", "1")
        hashes[name] = _hash(folder / f"graphs-{name}/model/model.safetensors")
    return {"ok": len(set(hashes.values())) == 1, **hashes}


def curves(flags: argparse.Namespace, folder: Path) -> Figures:
    """Each configuration on the CPU and on the device."""
    data = _builtin(flags, folder)
    found: Figures = {"ok": True}
    for name in CONFIGS[:2] if flags.small else CONFIGS:
        epochs = "1" if flags.small else {"recipe": "4"}.get(name, "3")
        reports = []
        for label, device in (("cpu", "cpu"), ("device", _device(flags))):
            began, run = time.monotonic(), folder / f"curve-{name}-{label}"
            try:
                reports.append(_train(data, run, name, device, flags, "--epochs", epochs))
            except AssertionError as error:
                found["ok"] = False
                found[name] = str(error)[-3000:]
                break
            found[f"{name}_{label}_seconds"] = time.monotonic() - began
        if len(reports) == 2:
            pairs = zip(*(report["epochs"] for report in reports), strict=True)
            measure = "val_ndcg" if name == "ranking" else "val_rmse"
            apart = max(abs(one[key] - two[key]) for one, two in pairs for key in ("train_rmse", measure))
            found[name] = {"apart": apart, measure: [epoch[measure] for epoch in reports[1]["epochs"]]}
            found["ok"] = found["ok"] and apart <= CURVE_TOLERANCE
    return found


def resume(flags: argparse.Namespace, folder: Path) -> Figures:
    """Half a training on one device, the rest on the other, against the whole on the CPU."""
    data, device = _builtin(flags, folder), _device(flags)
    found: Figures = {}
    name = "vignette_mf_advanced"
    _train(data, folder / "whole", name, "cpu", flags, "--epochs", "2")
    for first, second in ((device, "cpu"), ("cpu", device)):
        run = folder / f"resume-{first}-{second}"
        _train(data, run, name, first, flags, "--epochs", "1")
        _train(data, run, name, second, flags, "--epochs", "2")
        found[f"{first}-{second}"] = _apart(folder / "whole", run)
    return {"ok": max(found.values()) <= TABLE_TOLERANCE, **found}


def ranks(flags: argparse.Namespace, folder: Path) -> Figures:
    """Two processes on the one device under gloo (NCCL refuses two ranks on a device), against one process."""
    data = _builtin(flags, folder)
    alone = _train(data, folder / "ranks-1", "vignette_mf_advanced", "cpu", flags, "--epochs", "1")
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--section", "ranks", "--out", f"{place}/out", "--folder", str(folder)]
        children = []
        for rank in range(2):
            env = {**os.environ, "CHECK_RANK": str(rank), "CHECK_STORE": f"{place}/store"}
            small = ["--small"] if flags.small else []
            children.append(subprocess.Popen([*command, *small], env=env, stdout=subprocess.PIPE,
                                             stderr=subprocess.STDOUT, text=True))  # fmt: skip
        output = [child.communicate(timeout=120)[0] for child in children]
    if any(child.returncode for child in children):
        raise AssertionError("\n".join(output)[-8000:])
    both = json.loads((folder / "ranks-2/report.json").read_text())
    apart = abs(both["epochs"][0]["train_rmse"] - alone["epochs"][0]["train_rmse"])
    return {"ok": apart <= CURVE_TOLERANCE, "apart": apart, "device": both["device"], "world_size": both["world_size"]}


def _one_of_two_ranks(flags: argparse.Namespace, folder: Path) -> None:
    """One rank of the section ``ranks``."""
    import torch
    import torch.distributed as dist

    from mfdist.cluster.world import World
    from mfdist.config import read_toml
    from mfdist.training.config import TrainConfig
    from mfdist.training.train import train

    rank = int(os.environ["CHECK_RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["CHECK_STORE"], 2), rank=rank, world_size=2)
    world = World(rank, 2, torch.device(_device(flags)), connected=True)
    values = read_toml(TrainConfig, "vignette_mf_advanced")
    config = TrainConfig(data=str(folder / "data"), run_dir=str(folder / "ranks-2"), **values)
    train(replace(config, epochs=1, batch_size=_batch(flags)), world)
    world._leave(all_alive=True)


def recommend(flags: argparse.Namespace, folder: Path) -> Figures:
    """The same lists from both devices, but for scores that are equal to rounding."""
    import pyarrow.parquet as pq

    data = _builtin(flags, folder)
    run = folder / "recommend"
    _train(data, run, "vignette_mf_advanced", "cpu", flags, "--epochs", "1")
    tables, seconds = [], {}
    for label, device in (("cpu", "cpu"), ("device", _device(flags))):
        out = folder / f"top-{label}.parquet"
        began = time.monotonic()
        _job("recommend", "--run-dir", run, "--out", out, "--device", device)
        seconds[f"{label}_seconds"] = time.monotonic() - began
        tables.append(pq.read_table(out))
    one, two = tables
    scores = [np.asarray(table["score"]) for table in (one, two)]
    apart = float(np.max(np.abs(scores[0] - scores[1])))
    same = float(np.mean(np.asarray(one["item_id"]) == np.asarray(two["item_id"])))
    return {"ok": apart < 1e-4 and same > 0.99, "score_apart": apart, "same_items": same, **seconds}


def feed(flags: argparse.Namespace, folder: Path) -> Figures:
    """Rows of the loader that arrive on the device, in their batches, and that they are the CPU's."""
    import gpu_speed

    return gpu_speed.feed(_electronics(flags, folder, "random"), _device(flags))


def speed(flags: argparse.Namespace, folder: Path) -> Figures:
    """Training at the Electronics file's size, resident and fed."""
    import gpu_speed

    device = _device(flags)
    return gpu_speed.speed(
        {order: _electronics(flags, folder, order) for order in ("random", "blocks")}, device, flags.small
    )


SECTIONS: dict[str, tuple[Callable[[argparse.Namespace, Path], Figures], float]] = {
    "kernels": (kernels, 200), "adamw": (adamw, 60), "graphs": (graphs, 120), "curves": (curves, 150), 
    "resume": (resume, 90), "ranks": (ranks, 100), "recommend": (recommend, 60), "feed": (feed, 90),
    "speed": (speed, 150),
}  # fmt: skip
"""Section -> (what it does, most seconds)."""


# Pieces ---------------------------------------------------------------------------------------------


def _device(flags: argparse.Namespace) -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if not flags.small:
        raise SystemExit("error: torch finds no CUDA device here; --small runs the same programs on a CPU.")
    return "cpu"


def _batch(flags: argparse.Namespace) -> int:
    return 200 if flags.small else 8192


def _pytest(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _job(name: str, *words: object) -> None:
    """Run a job in a process of its own; AssertionError with its output where it fails."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def _builtin(flags: argparse.Namespace, folder: Path) -> Path:
    """A small dataset, made once a folder."""
    out = folder / "data"
    if not (out / "dataset.json").exists():
        rows = 1500 if flags.small else 200_000
        _job("synthesize", "--rows", rows, "--out", folder / "small.csv")
        _job("prepare", folder / "small.csv", "--out", out, *(["--lanes", 4] if flags.small else []))
    return out


def _electronics(flags: argparse.Namespace, folder: Path, order: str) -> Path:
    """A dataset of the Electronics file's size, made once a folder."""
    out = folder / f"electronics-{order}"
    source = folder / "electronics.parquet"
    if not source.exists():
        words = ["--rows", 3000] if flags.small else ["--preset", "electronics"]
        _job("synthesize", *words, "--out", source)
    if not (out / "dataset.json").exists():
        _job("prepare", source, "--out", out, "--order", order, *(["--lanes", 4] if flags.small else []))
    return out


def _train(data: Path, run: Path, name: str, device: str, flags: argparse.Namespace, *words: str) -> Figures:
    """One training by the job; its report."""
    batch = ["--batch-size", _batch(flags)] if name.startswith("vignette") else []
    _job("train", "--data", data, "--run-dir", run, "--config", name, "--device", device, *batch, *words)
    return dict(json.loads((run / "report.json").read_text()))


def _hash(path: Path) -> str:
    import hashlib

    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _apart(one: Path, two: Path) -> float:
    """The largest relative RMS between the exported tables of two runs."""
    from safetensors.numpy import load_file

    tables = [load_file(run / "model/model.safetensors") for run in (one, two)]
    return max(
        float(np.linalg.norm(tables[1][name] - value) / max(np.linalg.norm(value), 1e-12))
        for name, value in tables[0].items()
    )


# All of it ------------------------------------------------------------------------------------------


def run_section(flags: argparse.Namespace) -> None:
    """In a process of its own: write the section's figures to --out."""
    assert flags.section and flags.folder
    if flags.section == "ranks" and "CHECK_RANK" in os.environ:
        _one_of_two_ranks(flags, flags.folder)
        return
    began = time.monotonic()
    try:
        found = SECTIONS[flags.section][0](flags, flags.folder)
    except BaseException:
        found = {"ok": False, "error": traceback.format_exc()[-8000:]}
    flags.out.write_text(json.dumps({**found, "seconds": time.monotonic() - began}, indent=1))


def main() -> int:
    flags = arguments()
    if _device(flags) == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    if flags.section:
        run_section(flags)
        return 0
    import gpu_speed  # after the environment is set: it imports triton

    began, results = time.monotonic(), {}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = flags.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for name in flags.only or list(SECTIONS):
            left = flags.budget - (time.monotonic() - began)
            limit = min(SECTIONS[name][1], left)
            if limit < 5:
                results[name] = {"ok": False, "error": "no time was left for it"}
                continue
            out = folder / f"section-{name}.json"
            out.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--section", name, "--out", str(out), "--folder", str(folder)]
            log = io.StringIO()
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = subprocess.run([*command, *(["--small"] if flags.small else [])], timeout=limit, check=False,
                                      capture_output=True, text=True)  # fmt: skip
                log.write(done.stdout[-6000:] + done.stderr[-6000:])
            missing = f"ended or ran past {limit:.0f} s without a result\n{log.getvalue()}"
            results[name] = json.loads(out.read_text()) if out.exists() else {"ok": False, "error": missing}
            flags.out.write_text(json.dumps({"machine": gpu_speed.machine(), "sections": results}, indent=1))
            seconds = results[name].get("seconds", limit)
            print(f"{'pass' if results[name]['ok'] else 'FAIL'}  {name}  {seconds:.0f} s", flush=True)
    print(json.dumps(gpu_speed.machine()))
    for name, found in results.items():
        short = {key: value for key, value in found.items() if key not in ("output", "ends")}
        print(f"{name}: {json.dumps(short)[:1500]}")
    return 0 if all(found["ok"] for found in results.values()) else 5


if __name__ == "__main__":
    sys.exit(main())

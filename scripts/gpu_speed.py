"""Rates on a device, for ``check_gpu``: the machine, the loader's feed, steps on resident and on fed batches."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.model.gpu_step import GpuStep
from mfdist.model.models import ITEM_TABLE, USER_TABLE, Form, MFAdvanced
from mfdist.model.objective import Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import ShardedTable, item_layout, user_layout

Figures = dict[str, Any]
Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
RATES = {"adamw": 0.0005, "sparse_adam": 0.0005, "rowwise_adagrad": 0.05, "sgd": 1.0}


def machine() -> Figures:
    """What the figures were measured on."""
    found: Figures = {"torch": torch.__version__, "cpus": os.cpu_count(), "python": sys.version.split()[0]}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "memory_gib": about.total_memory / 2**30, "sms": about.multi_processor_count}
    return found


def feed(data: Path, device: str) -> Figures:
    """Rows of the loader that arrive on the device, in their batches, and that they are the CPU's."""
    dataset = Dataset.open(str(data))
    found: Figures = {}
    sums = []
    for label, place in (("cpu", "cpu"), ("device", device)):
        loader = Loader(dataset, batch_size=65536, seed=1, rank=0, world_size=1, device=torch.device(place))
        rates = []
        for epoch in range(3):
            began, total, rows = time.monotonic(), torch.zeros(3, dtype=torch.float64, device=place), 0
            for batch in loader.epoch(epoch):
                rows += len(batch.rating)
                for k, column in enumerate((batch.user, batch.item, batch.rating)):
                    total[k] += column.double().sum() * (1 + batch.step % 7)
            last = total.cpu().tolist()
            rates.append(rows / (time.monotonic() - began) / 1e6)
        sums.append(last)
        found[f"{label}_m_rows_per_second"] = max(rates)
        loader.close()
    return {"ok": bool(np.allclose(*sums, rtol=1e-12)), **found}


def speed(datasets: dict[str, Path], device: str, small: bool) -> Figures:
    """Exact AdamW on resident batches and through the loader, and with ``blocks`` the other optimizers.

    ``datasets``: order -> dataset. Bytes are counted from the distinct rows of each batch.
    """
    found: Figures = {"ok": True, "copy_gb_per_second": copy_bandwidth(device, 1 << (20 if small else 29))}
    for order, data in datasets.items():
        for size in (256,) if small else (65536, 1 << 20):
            for kind in ("adamw",) if small or order == "random" else tuple(RATES):
                try:
                    one = _rates(data, device, kind, size, small)
                    moved = one["resident_m_per_second"] * 1e6 * one["bytes_per_rating"]
                    one["share_of_copy"] = moved / found["copy_gb_per_second"] / 1e9
                except Exception:
                    found["ok"] = False
                    one = {"error": traceback.format_exc()[-2000:]}
                found[f"{order}_{kind}_{size}"] = one
                print(order, kind, size, json.dumps(one), flush=True)
                if device == "cuda":
                    torch.cuda.empty_cache()
    return found


def copy_bandwidth(device: str, numbers: int) -> float:
    """GB/s of a copy of so many float32 on the device, bytes read and written counted."""
    source, target = (torch.empty(numbers, device=device).normal_() for _ in range(2))
    seconds = []
    for _ in range(8):
        wait_for(device)
        began = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 8 * numbers / statistics.median(seconds) / 1e9


def wait_for(device: str) -> None:
    """Return when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _rates(data: Path, device: str, kind: str, size: int, small: bool) -> Figures:
    """Of one optimizer and batch size: M ratings/s of resident and of fed batches, bytes, memory, kernels' times."""
    dataset = Dataset.open(str(data))
    loader = Loader(dataset, batch_size=size, seed=1, rank=0, world_size=1, device=torch.device(device))
    step, row_bytes, width = _step_of(dataset, device, kind, 20 * loader.num_steps)
    batches: list[Columns] = []
    for batch in loader.epoch(0):
        if len(batch.rating) == size:
            batches.append((batch.user.clone(), batch.item.clone(), batch.rating.clone()))
        if small and len(batches) == 2:
            break
    _resident_rate(step, batches, device)  # compiles, records graphs
    resident = [_resident_rate(step, batches, device) for _ in range(2 if small else 5)]
    fed = [_fed_rate(step, loader, 1 + epoch, device, small) for epoch in range(1 if small else 3)]
    loader.close()
    rows = size * len(batches)
    users, items = (sum(len(torch.unique(batch[side])) for batch in batches) / rows for side in (0, 1))
    # Tables are read and written once a distinct row; between the passes an item's row is written once a batch and
    # read by each rating, a user's likewise.
    buffers = 2 * 4 * width * (1 + (users + items) / 2) + 12 + 8 * 4
    return {
        "resident_m_per_second": statistics.median(resident), "fed_m_per_second": statistics.median(fed),
        "distinct_users": users, "distinct_items": items,
        "bytes_per_rating": 2 * row_bytes * (users + items) + buffers,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0, "row_bytes": row_bytes,
        "microseconds_a_step": _kernel_microseconds(step, batches[:5]) if device == "cuda" else {},
    }  # fmt: skip


def _step_of(dataset: Dataset, device: str, kind: str, steps: int) -> tuple[GpuStep, int, int]:
    """The step of mf_advanced with 32 factors, the bytes of a packed row, and its trained columns."""
    world = World.alone(device)
    form = Form(model="mf_advanced", dim=32, bias=True, init=True, sigmoid_range=(0.5, 5.5))
    optimizer = RowOptimizer(kind=kind, lr=RATES[kind], weight_decay=0.01, total_steps=steps)
    user = ShardedTable(user_layout(dataset.manifest, 1), form.width, optimizer, world, at_home=True)
    item = ShardedTable(item_layout(dataset.manifest, 1), form.width, optimizer, world, at_home=False)
    for number, table in ((USER_TABLE, user), (ITEM_TABLE, item)):
        table.initialise(lambda first, end, number=number: form.initial(1, number, first, end))  # type: ignore[misc]
    step = GpuStep(MFAdvanced(form, user, item), optimizer, Objective())
    return step, 4 * user.packed.shape[-1] if user.packed.ndim > 1 else 0, form.width


def _resident_rate(step: GpuStep, batches: Sequence[Columns], device: str) -> float:
    """M ratings/s of batches that lie on the device."""
    wait_for(device)
    began = time.perf_counter()
    for columns in batches:
        step(*columns, len(columns[0]))
    wait_for(device)
    return sum(len(columns[0]) for columns in batches) / (time.perf_counter() - began) / 1e6


def _fed_rate(step: GpuStep, loader: Loader, epoch: int, device: str, small: bool) -> float:
    """M ratings/s of an epoch through the loader (``small``: of its first batch)."""
    wait_for(device)
    began, count = time.perf_counter(), 0
    for batch in loader.epoch(epoch):
        step(batch.user, batch.item, batch.rating, batch.global_rows)
        count += len(batch.rating)
        if small:
            break
    wait_for(device)
    return count / (time.perf_counter() - began) / 1e6


def _kernel_microseconds(step: GpuStep, batches: Sequence[Columns]) -> dict[str, float]:
    """Microseconds a step of the kernels that take most of it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for columns in batches:
            step(*columns, len(columns[0]))
        torch.cuda.synchronize()
    times = sorted(((one.self_device_time_total, one.key) for one in seen.key_averages()), reverse=True)[:10]
    return {name[:60]: round(time / len(batches), 1) for time, name in times}

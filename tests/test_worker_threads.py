"""The threads that share the step of one process: any number gives the same bits, awake or asleep; they end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from mfdist.cluster.world import World
from mfdist.kernels import numba_intrinsics
from mfdist.model import cpu_step
from mfdist.model.cpu_step import FusedStep
from mfdist.model.models import Form, MFAdvanced
from mfdist.model.objective import Objective
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import Layout, ShardedTable

ROWS = (300, 90)
SIZES = (700, 30, 4000, 700)  # shared out, by one thread alone, into larger arrays, shared out again


def step_by(threads):
    world = World.alone("cpu")
    form = Form(model="mf_advanced", dim=20, bias=True, init=True, sigmoid_range=(0.5, 5.5))
    optimizer = RowOptimizer(kind="adamw", lr=0.01, total_steps=60, weight_decay=0.01)
    tables = [ShardedTable(Layout((((0, n),),), (0, 1)), form.width, optimizer, world, at_home=True) for n in ROWS]
    for number, table in enumerate(tables):
        table.initialise(lambda first, end, number=number: form.initial(1, number, first, end))
    return FusedStep(MFAdvanced(form, *tables), optimizer, Objective(), threads)


def wait_until_asleep(threads):
    """Return when every helper has gone to sleep since it was last woken, however busy the machine is."""
    end = time.monotonic() + 60
    while any(threads._sleeps[:, 0] <= threads._woken):
        assert time.monotonic() < end
        time.sleep(0.001)


def trained(threads, sleep=False):
    """Both tables, and the sum of squared errors of every step."""
    rng, step, errors = np.random.default_rng(3), step_by(threads), []
    try:
        for size in SIZES * 3:
            user, item = (torch.from_numpy(rng.integers(0, n, size, dtype=np.int32)) for n in ROWS)
            step(user, item, torch.from_numpy(rng.integers(1, 6, size).astype(np.float32)), size)
            errors.append(float(step.squared_error))
            if sleep:
                wait_until_asleep(step._step_threads)
        assert not sleep or sum(step._step_threads._woken) > 0
        step.settle()
        return [step.model.user.packed.clone(), step.model.item.packed.clone(), torch.tensor(errors)]
    finally:
        step.close()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cpu_step, "PARALLEL_ROWS", 100)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("sleep", [False, True], ids=["awake", "asleep"])
def test_any_number_of_threads_gives_the_same_bits(threads, sleep):
    for alone, shared in zip(trained(1), trained(threads, sleep), strict=True):
        assert torch.equal(alone, shared)


def test_threads_without_steps_take_no_time_and_end():
    before = set(threading.enumerate())
    step = step_by(3)
    batch = torch.zeros(200, dtype=torch.int32), torch.zeros(200, dtype=torch.int32), torch.ones(200)
    step(*batch, 200)
    assert len(set(threading.enumerate()) - before) == 2
    time.sleep(0.1)  # to fall asleep
    used = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.1
    step.close()
    assert set(threading.enumerate()) == before


def test_a_look_gives_up_and_sees_an_arrival():
    gate = np.zeros(16, np.int64)
    assert not numba_intrinsics.wait_briefly(gate, 1)
    numba_intrinsics.arrive(gate)
    assert numba_intrinsics.wait_briefly(gate, 1) and not numba_intrinsics.wait_briefly(gate, 2)

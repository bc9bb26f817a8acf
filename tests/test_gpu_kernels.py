"""The GPU's kernels: on a GPU where there is one, else in Triton's interpreter; against the reference and the CPU's.

``pytest tests/test_gpu_kernels.py -m "slow or not slow"`` on a machine with a GPU runs all of it there, compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import make_dataset
from interpreted import ON_GPU
from ranks import run_ranks

from mfdist.cluster.world import World
from mfdist.log import Console
from mfdist.model.cpu_step import FusedStep
from mfdist.model.models import MF, Form, MFAdvanced
from mfdist.model.objective import ITEM, USER, Objective, shares_of
from mfdist.model.optimizers import RowOptimizer
from mfdist.model.tables import Layout, ShardedTable
from mfdist.training import session as sessions
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

USERS, ITEMS = 40, 25
QUIET = Console(speaks=False)


def model_on(device, *, dim, bias, optimizer, sigmoid=True):
    """A model with tables of its own, the same weights for the same arguments."""
    world = World.alone(device)
    form = Form(
        model="mf_advanced" if bias else "mf", dim=dim, bias=bias, init=False,
        sigmoid_range=(0.5, 5.5) if sigmoid else None,
    )  # fmt: skip
    tables = [
        ShardedTable(Layout((((0, rows),),), (0, 1)), form.width, optimizer, world, at_home=True)
        for rows in (USERS, ITEMS)
    ]
    for number, table in enumerate(tables):
        table.initialise(lambda first, end, number=number: 0.3 * form.initial(1, number, first, end))
    return (MFAdvanced if bias else MF)(form, *tables)


def gpu_step(model, optimizer, objective, shares):
    from mfdist.model.gpu_step import GpuStep

    return GpuStep(model, optimizer, objective, shares)


def cpu_step(model, optimizer, objective, shares):
    return FusedStep(model, optimizer, objective, 1, shares)


class ReferenceStep:
    """torch's autograd and ``kernels.reference``, behind the same interface."""

    def __init__(self, model, optimizer, objective, shares):
        self.model, self.objective, self.shares = model, objective, shares

    def __call__(self, user, item, rating, global_rows):
        model, form = self.model, self.model.form
        scored = model(user, item)
        error = form.value_of_score(form.score(scored.user, scored.item, model.offset)) - rating
        penalty = torch.zeros(())
        for side, index, rows in ((USER, user, scored.user), (ITEM, item, scored.item)):
            if self.shares:
                penalties = torch.from_numpy(self.objective.penalties(side, form.dim, form.width, 0))
                share = torch.from_numpy(self.shares[side])[index.long(), None]
                penalty = penalty + ((penalties[0] + share * penalties[1]) * rows.square()).sum()
        loss = error.square().sum()
        model.zero_grad()
        ((loss + penalty) * self.objective.weight(global_rows)).backward()
        model.user.apply_gradient()
        model.item.apply_gradient()
        self.squared_error = error.detach().double().square().sum()
        return loss.detach() / global_rows

    def settle(self):
        self.model.settle()


def batch_of(generator, rows, turn):
    """Ratings of few and of many rows; one user and one item have long segments in a batch of 100 or more."""
    user = torch.randint(0, USERS, (rows,), generator=generator).int()
    item = torch.randint(0, ITEMS, (rows,), generator=generator).int()
    user[: rows * 2 // 5] = 7
    item[rows // 3 : rows * 5 // 6] = 3
    user[rows // 2 :] %= 1 + (turn * 13) % USERS  # most rows have gaps of their own
    return user, item, torch.randint(1, 6, (rows,), generator=generator).float()


GAPS = (0, 1, 3, 6, 11, 20, 120, 124, 128, 320, 1320, 1321)
"""Steps that a case takes, with gaps of 1, 2, 4, 8, 99, 3 (rules are polynomials by then), the horizon, a thousand."""


PENALTY = {"l2": (0.02, 0.02, 0.03, 0.03, 0.0, 0.0), "row_l2": (0.1, 0.2, 0.3, 0.4, 0.0, 0.0)}


def run_steps(make, device, *, kind, dim, bias, steps=GAPS, rows=(130, 64, 1), penalty=None, **values):
    """Tables, loss, gradient of the offset and squared errors after ``steps``, as float64 on the CPU."""
    options = {"lr": 0.01, "lr_schedule": "cosine", "weight_decay": 0.1, **values}
    sigmoid = options.pop("sigmoid", True)
    optimizer = RowOptimizer(kind=kind, total_steps=1500, **options)
    model = model_on(device, dim=dim, bias=bias, optimizer=optimizer, sigmoid=sigmoid)
    objective = Objective(**(PENALTY if penalty is None else penalty))
    counts = (np.arange(rows) % 9 for rows in (USERS, ITEMS))
    step = make(model, optimizer, objective, tuple(map(shares_of, counts)) if objective.penalised else None)
    generator = torch.Generator().manual_seed(3)
    sums = []
    for turn, now in enumerate(steps):
        model.user.step = model.item.step = now
        batch = [tensor.to(device) for tensor in batch_of(generator, rows[turn % len(rows)], turn)]
        loss = step(*batch, len(batch[0]))
        grad = 0.0 if model.offset is None else float(model.offset.grad)
        sums.append([float(loss), float(step.squared_error), grad])
    model.user.step = model.item.step = steps[-1] + 30
    step.settle()
    return model, np.array(sums)


def assert_equal_runs(got, want, tolerance):
    """Every column group of both tables within ``tolerance`` (relative RMS), ``last`` exactly.

    A number whose gradients all but cancel is divided by the root of their squares, next to nothing: Adam makes a step
    of what rounding has left there. One weight in a thousand may be apart by STRAY.
    """
    (model, sums), (wanted, wanted_sums) = got, want
    np.testing.assert_allclose(sums, wanted_sums, rtol=tolerance, atol=tolerance / 10)
    for table, other in ((model.user, wanted.user), (model.item, wanted.item)):
        assert table.rows.last.tolist() == other.rows.last.tolist()
        for name, tensor in other.rows.tensors().items():
            found, expected = table.rows.tensors()[name].double().cpu(), tensor.double().cpu()
            apart = (found - expected).abs().flatten().sort().values
            most = len(apart) - (1 + len(apart) // 1000) * (name == "weight")
            assert apart[:most].norm() <= tolerance * expected.norm(), name
            assert most == len(apart) or apart[-1] <= STRAY, name


DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 1e-5
STRAY = 1e-4
"""Seen of adamw, 8 factors, no bias: one weight of 320 apart by 4.9e-5 on one CPU, the others by 1.7e-7 at most; with
it the relative RMS is 2.1e-5 there, and was 2.6e-5 on an H200."""

SUM = {"reduction": "sum"}
FEW = [("adamw", 8, True), ("rowwise_adagrad", 8, False)]
MANY = [
    *[("adamw", dim, bias) for dim in (1, 8, 32, 100) for bias in (False, True)],
    *[(kind, dim, dim != 8) for kind in ("sparse_adam", "rowwise_adagrad", "sgd") for dim in (1, 8, 32)],
]


@pytest.mark.parametrize(("kind", "dim", "bias"), FEW)
def test_equals_the_reference(kind, dim, bias):
    case = {"kind": kind, "dim": dim, "bias": bias}
    assert_equal_runs(run_steps(gpu_step, DEVICE, **case), run_steps(ReferenceStep, "cpu", **case), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dim", "bias"), MANY)
def test_equals_the_reference_and_the_cpu_kernels(kind, dim, bias):
    for values in (
        {},
        {"sigmoid": False, "lr_schedule": "constant", "eps": 1e-4, "betas": (0.8, 0.99), "penalty": SUM},
    ):
        case = {"kind": kind, "dim": dim, "bias": bias, "rows": (300, 33, 8, 1), **values}
        got = run_steps(gpu_step, DEVICE, **case)
        assert_equal_runs(got, run_steps(ReferenceStep, "cpu", **case), TOLERANCE)
        assert_equal_runs(got, run_steps(cpu_step, "cpu", **case), TOLERANCE)


MEMBERS = [("sgd", 8, 2, 0.5), ("sgd", 16, 1, 0.25), ("adamw", 8, 2, 0.0)]
MANY_MEMBERS = [("sgd", 128, 8, 0.25), ("sgd", 8, 4, 1.0), ("sgd", 32, 1, 0.0), ("sparse_adam", 16, 4, 0.0)]


def run_members(make, device, *, kind, dim, members, implicit, steps, rows):
    """As :func:`run_steps`, for a model of members and, where ``implicit``, bags, with the recipe's penalties."""
    optimizer = RowOptimizer(kind=kind, total_steps=1500, lr=0.02, lr_schedule="cosine", weight_decay=0.0)
    form = Form(
        model="mf_advanced", dim=dim, bias=True, init=True, sigmoid_range=None, members=members, init_std=0.3,
        implicit=implicit,
    )  # fmt: skip
    world = World.alone(device)
    tables = [
        ShardedTable(Layout((((0, size),),), (0, 1)), form.stored_width(side), optimizer, world, at_home=True)
        for side, size in ((USER, USERS), (ITEM, ITEMS))
    ]
    for side, table in enumerate(tables):
        table.initialise(lambda first, end, side=side: form.initial(1, side, first, end))
    model = MFAdvanced(form, *tables)
    objective = Objective(
        reduction="sum", l2=(0.027, 0.02, 0.01, 0.015, 0.04, 0.03), row_l2=(5.4, 4.0, 5.0, 6.5, 6.4, 28.0)
    )
    counts = [300 + np.arange(size) % 9 for size in (USERS, ITEMS)]
    step = make(model, optimizer, objective, tuple(map(shares_of, counts)))
    generator, sums = torch.Generator().manual_seed(3), []
    for turn, now in enumerate(steps):
        model.user.step = model.item.step = now
        batch = [tensor.to(device) for tensor in batch_of(generator, rows[turn % len(rows)], turn)]
        batch[2] = (batch[2] - 3) / 4
        loss = step(*batch, len(batch[0]))
        sums.append([float(loss), float(step.squared_error), float(model.offset.grad)])
    model.user.step = model.item.step = steps[-1] + 30
    step.settle()
    return model, np.array(sums)


@pytest.mark.parametrize(("kind", "dim", "members", "implicit"), MEMBERS)
def test_members_and_bags_equal_the_cpu_kernels(kind, dim, members, implicit):
    case = {"kind": kind, "dim": dim, "members": members, "implicit": implicit, "steps": (0, 1, 4), "rows": (130, 20)}
    assert_equal_runs(run_members(gpu_step, DEVICE, **case), run_members(cpu_step, "cpu", **case), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dim", "members", "implicit"), [*MEMBERS, *MANY_MEMBERS])
def test_members_and_bags_equal_the_cpu_kernels_over_gaps(kind, dim, members, implicit):
    case = {"kind": kind, "dim": dim, "members": members, "implicit": implicit, "steps": GAPS, "rows": (300, 33, 8, 1)}
    assert_equal_runs(run_members(gpu_step, DEVICE, **case), run_members(cpu_step, "cpu", **case), TOLERANCE)


def bits(table):
    return table.packed.view(torch.int32)


def test_same_steps_twice_give_the_same_bits():
    case = {"kind": "adamw", "dim": 8, "bias": True, "steps": (0, 1, 40)}
    first, second = (run_steps(gpu_step, DEVICE, **case) for _ in range(2))
    assert (first[1] == second[1]).all()
    assert torch.equal(bits(first[0].user), bits(second[0].user))
    assert torch.equal(bits(first[0].item), bits(second[0].item))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_graph_gives_the_bits_of_its_kernels():
    from mfdist.model.gpu_step import GpuStep

    case = {"kind": "adamw", "dim": 32, "bias": True, "rows": (300,)}
    runs = [
        run_steps(lambda *arguments, graphs=graphs: GpuStep(*arguments, graphs=graphs), DEVICE, **case)
        for graphs in (True, False)
    ]
    assert (runs[0][1] == runs[1][1]).all()
    assert torch.equal(bits(runs[0][0].user), bits(runs[1][0].user))
    assert torch.equal(bits(runs[0][0].item), bits(runs[1][0].item))


def small_config(data, run, **values):
    small = {"batch_size": 90, "epochs": 1, "emb_dim": 4, "device": "cpu", "checkpoint_every": "2", "l2": (0.01, 0.02)}
    return TrainConfig.ready("vignette_mf_advanced", data=data, run_dir=str(run), **{**small, **values})


def train_on_gpu_kernels(world, configs):
    """Whole runs with the GPU's step, whatever the device; module level for the spawned ranks."""
    sessions.fast_step = lambda config, model, optimizer, objective, shares, _ratings: gpu_step(
        model, optimizer, objective, shares
    )
    return [train(config, world, QUIET) for config in configs]


@pytest.mark.skipif(ON_GPU, reason="its tables are on the CPU, for the interpreter")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_whole_run_equals_the_cpus(tmp_path, monkeypatch, ranks):
    data = str(tmp_path / "data")
    make_dataset(data, rows=250, lanes=4, val_rows=40, users=50, items=20, row_group=32)
    want = train(small_config(data, tmp_path / "cpu"), World.alone(), QUIET)
    monkeypatch.setattr(sessions, "fast_step", sessions.fast_step)
    (got,) = run_ranks(ranks, train_on_gpu_kernels, [small_config(data, tmp_path / "gpu")])[0]
    assert abs(got["epochs"][0]["train_rmse"] - want["epochs"][0]["train_rmse"]) < 1e-5
    assert abs(got["final"]["val_rmse"] - want["final"]["val_rmse"]) < 1e-5


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mfdist.kernels import gpu, gpu_grouping, packed, stride_of
from mfdist.kernels import gpu_arguments as given

POINTERS = {"lasts": "i32", "rows": "i32", "starts": "i32", "count": "i32", "order": "i64", "number": "i32",
            "item_slot": "i32", "user_slot": "i32", "other_slot": "i32", "slot": "i32", "clock": "i32", "head": "i32",
            "ids": "i32"}
SCALARS = {"scale": "fp32", "low": "fp32", "span": "fp32", "n": "i32", "blocks": "i32",
           "penalties": ("*fp32", "fp32", "fp32", "fp32", "fp32", "fp32", "fp32", "fp32")}
SCALARS["rules"] = ("*fp64", "*fp32", "*fp32", "*fp32", "i32", "i32", "fp32", "fp32", "fp32")
KERNELS = {
    "heads": {"n": "i32"}, "list_rows": {}, "gather": {}, "settle": {"number": "i32"}, "user_pass": {}, "row_pass": {},
    "long_parts": {}, "long_rows": {}, "update": {}, "block_sums": {"out": "*fp64"},
}

def compiled(name, shape, target):
    kernel = getattr(gpu, name, None) or getattr(gpu_grouping, name)
    rows = given.tile_rows(shape)
    constants = {"SHAPE": shape, "PITCH": 40, "OWN_PITCH": 40, "ITEM_PITCH": 40, "OTHER_PITCH": 40, "OUT_PITCH": 40,
                 "M": max(shape[7], 1), "BAGS": shape[8] > 0,
                 "LONG": given.CHUNK, "C": given.CHUNK, "R": rows, "SCORE": True,
                 "T": given.tile_rows(shape, given.PART_TILE, 64), "UPDATE": True, "B": given.SORT_BLOCK}
    signature, constexprs, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], constexprs[(place,)] = "constexpr", constants[argument]
            continue
        kind = KERNELS[name].get(argument) or SCALARS.get(argument)
        kind = kind or ("*" + POINTERS.get(argument, "fp32"))
        signature[argument] = kind
        if kind[0] == "*":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=given.OPTIONS)

for dim, bias, kind, members, bags in [eval(word) for word in sys.argv[2:]]:
    for name in KERNELS:
        width = dim + (bias and not members)
        state = {"adamw": 2 * width, "rowwise_adagrad": 1, "sgd": 0}[kind]
        stride = stride_of(width + 2 * dim * bags, state)
        shape = given.shape_of(dim, bias, packed.KINDS[kind], stride, not members, True, members, bags)
        done = compiled(name, shape, GPUTarget("cuda", int(sys.argv[1]), 32))
        print(name, dim, bias, kind, len(done.asm["cubin"]), done.metadata.shared, flush=True)
        if name in ("settle", "user_pass", "row_pass", "long_rows", "update"):
            # Rows are updated in place: all warps have loaded what they need before any of them stores.
            stores = done.asm["ttgir"].rindex("barrier")
            assert done.asm["ttgir"].count("tt.store", stores) >= (1 if kind == "sgd" else 3), name
            assert "tt.load" not in done.asm["ttgir"][stores:], name
        if len(sys.argv) > 2 and "KEEP" in __import__("os").environ:
            open(f"{__import__('os').environ['KEEP']}/{name}-{dim}-{kind}.cubin", "wb").write(done.asm["cubin"])
            open(f"{__import__('os').environ['KEEP']}/{name}-{dim}-{kind}.ttgir", "w").write(done.asm["ttgir"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile_for_a_gpu_that_is_not_here(capability):
    """To machine code, without a device: Triton's compiler and its assembler need none."""
    cases = ["(32,True,'adamw',0,False)", "(100,False,'adamw',0,False)", "(8,True,'rowwise_adagrad',0,False)",
             "(1,False,'sgd',0,False)", "(128,True,'sgd',8,True)", "(64,True,'adamw',4,False)"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), *cases], capture_output=True, text=True, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(result.stdout.splitlines()) == 10 * len(cases)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the whole of it runs there by scripts/check_gpu")
def test_check_gpu_runs_small_without_a_gpu(tmp_path):
    """Each section's program, at tiny sizes, with Triton's kernels in the interpreter."""
    command = ["scripts/check_gpu", "--small", "--out", str(tmp_path / "small.json"), "--budget", "1500"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    sections = json.loads((tmp_path / "small.json").read_text())["sections"]
    assert len(sections) == 9 and all(found["ok"] for found in sections.values())

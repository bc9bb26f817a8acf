"""A ranking's step by the GPU's kernels: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import make_dataset
from interpreted import ON_GPU
from ranks import run_ranks
from safetensors.numpy import load_file

from mfdist.kernels import gpu_alternating
from mfdist.log import Console
from mfdist.model import alternating, alternating_gpu
from mfdist.model.alternating_cpu import CpuSolver
from mfdist.training.config import TrainConfig
from mfdist.training.train import train

DEVICE = "cuda" if ON_GPU else "cpu"
ROWS, OTHERS = 23, 31


def some_ratings(generator, number=400):
    """Rows of none, of few and of many ratings."""
    rows = torch.randint(0, ROWS - 2, (number,), generator=generator)
    rows[: number // 2] = 4
    return rows, torch.randint(0, OTHERS, (number,), generator=generator)


def table(generator, rows, dim, stride):
    return (0.3 * torch.randn(rows, stride, generator=generator))[:, :dim]


@pytest.mark.parametrize("dim", [3, 8, 33])
@pytest.mark.parametrize(("segment", "at_once"), [(16, 7), (512, 1 << 18)])
def test_rows_are_solved_as_on_a_cpu(monkeypatch, dim, segment, at_once):
    monkeypatch.setattr(gpu_alternating, "SEGMENT", segment)
    monkeypatch.setattr(alternating_gpu, "ROWS", at_once)
    generator = torch.Generator().manual_seed(dim)
    rows, others = some_ratings(generator)
    standing = table(generator, OTHERS, dim, dim + 3)
    gram, pulls = 0.7 * standing.T @ standing, 0.1 + torch.rand(ROWS, generator=generator)
    begun = table(generator, ROWS, dim, dim + 2)
    found = {}
    for solver, device in ((CpuSolver(1), "cpu"), (alternating_gpu.GpuSolver(), DEVICE)):
        x, y, g, c = (tensor.clone().to(device) for tensor in (begun, standing, gram, pulls))
        ratings = solver.group(rows.to(device), others.to(device), ROWS)
        assert solver.counts(ratings).cpu().tolist() == torch.bincount(rows, minlength=ROWS).tolist()
        squares = solver.solve(ratings, y, x, g, c, 3)
        sums = solver.observe(ratings, y, x, 0.0, -1.0)
        rest, ahead = sums.clone(), sums.clone()
        solver.begin(x, g, c, rest)
        solver.advance(x, g, c, rest, ahead, 0.5 * sums)
        wide = solver.gram(y.double())
        solver.close()
        found[type(solver).__name__] = [squares, *(tensor.cpu() for tensor in (x, sums, rest, ahead)), wide]
    for mine, theirs in zip(found["GpuSolver"], found["CpuSolver"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)
    assert (found["GpuSolver"][1][ROWS - 2 :] != 0).all()


def test_no_ratings_at_all_are_no_error():
    solver, none = alternating_gpu.GpuSolver(), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    ratings = solver.group(none, none, 3)
    x, y, g = (torch.ones(rows, 2, device=DEVICE) for rows in (3, 0, 2))
    assert solver.solve(ratings, y, x, g, torch.ones(3, device=DEVICE), 3) == 0 and (x == 1).all()


def test_a_repeated_run_has_the_same_bits():
    rows, others = (part.to(DEVICE) for part in some_ratings(torch.Generator().manual_seed(1), 3000))
    y = table(torch.Generator().manual_seed(2), OTHERS, 8, 8).to(DEVICE)
    x = table(torch.Generator().manual_seed(3), ROWS, 8, 8).to(DEVICE)
    solver = alternating_gpu.GpuSolver()
    first, second = (solver.observe(solver.group(rows, others, ROWS), y, x, 1.0, 1.0) for _ in range(2))
    assert torch.equal(first, second)


def train_on_gpu_kernels(world, c):
    """A training whose step takes the GPU's solver, whatever the device."""
    alternating.solver_on = lambda device, threads: alternating_gpu.GpuSolver()
    return train(c, world, Console(speaks=False))


def train_on_cpu(world, c):
    return train(c, world, Console(speaks=False))


@pytest.mark.skipif(DEVICE == "cuda", reason="scripts/check_gpu compares trainings on a GPU")
def test_a_training_is_that_of_the_cpu_on_one_and_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(alternating, "solver_on", alternating.solver_on)  # put back afterwards
    data = str(tmp_path / "data")
    make_dataset(data, rows=600, lanes=3, val_rows=100, users=50, items=30, row_group=64)

    def tables(name, ranks, work):
        c = TrainConfig.ready("ranking", data=data, run_dir=str(tmp_path / name), device="cpu", emb_dim=4, epochs=2)
        report = run_ranks(ranks, work, c, timeout=600)[0]
        return load_file(tmp_path / name / "model/model.safetensors"), report["epochs"][-1]["train_rmse"]

    expected, error = tables("cpu", 1, train_on_cpu)
    for ranks in (1, 2):
        found, its_error = tables(f"gpu{ranks}", ranks, train_on_gpu_kernels)
        assert its_error == pytest.approx(error, abs=1e-5)
        for name in ("user_embedding", "item_embedding"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4 * np.abs(expected[name]).max())

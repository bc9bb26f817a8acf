"""The closed form of missed AdamW steps against the steps themselves, one by one, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mfdist.kernels import cpu, packed
from mfdist.kernels.missed_steps import gauss_rules
from mfdist.model.optimizers import RowOptimizer


def replay(w, m, v, first, last, optimizer):
    """``torch.optim.AdamW``'s arithmetic with zero gradients, float64, steps first + 1 to last."""
    beta1, beta2 = optimizer.betas
    for t in range(first + 1, last + 1):
        rate = optimizer.rate(t)
        m, v = m * beta1, v * beta2
        w = w * (1 - rate * optimizer.weight_decay)
        w = w - rate / (1 - beta1**t) * m / (np.sqrt(v / (1 - beta2**t)) + optimizer.eps)
    return w, m, v


def caught_up(w, m, v, first, last, optimizer):
    weight, state = torch.tensor(w)[None].float(), (torch.tensor(m)[None].float(), torch.tensor(v)[None].float())
    optimizer.catch_up(weight, state, torch.tensor([first], dtype=torch.int32), last)
    return weight[0].double().numpy(), state[0][0].double().numpy(), state[1][0].double().numpy()


def caught_up_by_kernel(w, m, v, first, last, optimizer):
    shape = packed.shape_of(len(w), False, 0, packed.ADAMW)
    table = np.zeros(shape[2], np.float32)
    table[: 3 * len(w)] = np.concatenate([w, m, v])
    lasts = table.view(np.int32)
    lasts[-1] = first
    numbers = np.zeros(len(packed.STEP_FIELDS), np.float32)
    numbers[packed.STEP_FIELDS.index("eps")] = optimizer.eps
    rows, out = np.zeros(1, np.int32), np.empty((1, len(w)), np.float32)
    cpu.gather(shape, table, lasts, rows, 0, 1, out, last, packed.rule_arrays(optimizer.rules), numbers)
    assert lasts[-1] == last and (out[0] == table[: len(w)]).all()
    return table[: 3 * len(w)].astype("f8").reshape(3, -1)


@pytest.mark.parametrize("way", [caught_up, caught_up_by_kernel])
@settings(deadline=None, max_examples=60, derandomize=True)
@example(first=700, gap=3, schedule="constant", eps=1e-12, lr=0.1, betas=(0.9, 0.999), seed=1)  # two rules cancel most
@example(first=1, gap=9, schedule="constant", eps=1e-12, lr=0.1, betas=(0.9, 0.99), seed=9)  # eight nodes are too few
@given(
    first=st.one_of(st.integers(1, 12), st.integers(13, 900)),
    gap=st.one_of(st.integers(0, 12), st.integers(13, 1000)),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    eps=st.sampled_from([1e-12, 1e-8, 1e-4]),
    lr=st.sampled_from([1e-4, 5e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.99), (0.5, 0.9)]),
    seed=st.integers(0, 99),
)
def test_a_gap_equals_its_steps(way, first, gap, schedule, eps, lr, betas, seed):
    optimizer = RowOptimizer(
        kind="adamw", lr=lr, lr_schedule=schedule, total_steps=2000, weight_decay=0.1, eps=eps, betas=betas
    )
    rng = np.random.default_rng(seed)
    g = 10.0 ** rng.uniform(-9, 0, 24)
    m, v = (
        (g * rng.normal(size=24)).astype("f4").astype("f8"),
        (g**2 * rng.uniform(0.01, 4, 24)).astype("f4").astype("f8"),
    )
    w = rng.normal(size=24).astype("f4").astype("f8")
    want = replay(w, m, v, first, first + gap, optimizer)
    got = way(w, m, v, first, first + gap, optimizer)
    moved = np.abs(want[0] - w).max()
    assert np.abs(got[0] - want[0]).max() <= 2e-6 * max(moved, 1.0)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-5, atol=1e-25 * np.abs(m).max())  # see packed.FORGOTTEN
    np.testing.assert_allclose(got[2], want[2], rtol=2e-5, atol=1e-37)


def test_dropping_the_catch_up_would_be_seen():
    optimizer = RowOptimizer(kind="adamw", lr=0.005, total_steps=500, weight_decay=0.1)
    w, m, v = np.ones(3), np.full(3, 0.1), np.full(3, 0.01)
    want = replay(w, m, v, 10, 60, optimizer)[0]
    assert np.abs(want - w).max() > 1e-2
    np.testing.assert_allclose(caught_up(w, m, v, 10, 60, optimizer)[0], want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sparse_adam", "rowwise_adagrad", "sgd"])
def test_an_optimizer_without_momentum_only_decays(kind):
    optimizer = RowOptimizer(kind=kind, lr=0.01, lr_schedule="cosine", total_steps=100, weight_decay=0.5)
    weight = torch.ones(1, 4)
    state = tuple(torch.ones(1, w) for w in optimizer.state_widths(4))
    optimizer.catch_up(weight, state, torch.tensor([3], dtype=torch.int32), 50)
    want = np.prod([1 - optimizer.rate(t) * 0.5 for t in range(4, 51)])
    np.testing.assert_allclose(weight.numpy(), want, rtol=1e-6)
    assert all(bool((s == 1).all()) for s in state)


def test_untouched_rows_only_decay_and_keep_their_sign_of_life():
    optimizer = RowOptimizer(kind="adamw", lr=0.01, total_steps=100, weight_decay=0.5)
    weight = torch.ones(1, 4)
    optimizer.catch_up(weight, (torch.zeros(1, 4), torch.zeros(1, 4)), torch.tensor([-20], dtype=torch.int32), 50)
    np.testing.assert_allclose(weight.numpy(), 0.995**30, rtol=1e-6)


def test_gauss_rules_integrate_polynomials_exactly():
    rng = np.random.default_rng(1)
    x, a = rng.uniform(0.1, 1, (3, 40)), rng.uniform(0, 1, (3, 40))
    nodes, weights = gauss_rules(x, a, 5)
    for power in range(10):
        np.testing.assert_allclose((weights * nodes**power).sum(1), (a * x**power).sum(1), rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_has_ended_leaves_nothing_to_catch_up(schedule):
    """At the last step no weight is left in the rule: its polynomial must be 0 for every r in [0, 1]."""
    optimizer = RowOptimizer(kind="adamw", lr=0.01, total_steps=200, lr_schedule=schedule)
    rule = optimizer.rules.polynomials()[-1]
    assert (rule[1:] == 0).all() and rule[0] > 0

"""The reference arithmetic in plain torch, on any device: every fast kernel is tested against it.

All functions work in place on rows that are already gathered: ``weight`` (rows, width) float32, ``state`` a tuple of
float32 tensors with one row each, ``last`` (rows,) int32. ``last`` = t > 0: the row is as after step t and some
gradient has touched it; -t <= 0: as after step t, and no gradient ever has (its momentum is zero).
"""

from __future__ import annotations

import torch

from mfdist.kernels.missed_steps import SHORT_GAP, AdamRules

State = tuple[torch.Tensor, ...]


def decay(weight: torch.Tensor, last: torch.Tensor, log_decay: torch.Tensor, step: int) -> None:
    """Decoupled weight decay of the steps that the rows missed: w <- w D_step / D_last."""
    weight *= torch.exp(log_decay[step] - log_decay[last.abs().long()]).float()[:, None]


def adamw_catch_up(weight: torch.Tensor, state: State, last: torch.Tensor, tables: AdamTables, step: int) -> None:
    """Bring rows to the state after ``step``, all steps since ``last`` without a gradient."""
    m, v = state
    source = last.clamp(min=0).long()
    gap = (step - source).double()
    beta1, beta2 = tables.betas
    log_gain = tables.log_decay[step] - tables.log_decay[source]  # log(D_e / D_s)
    shrink_m = (beta1**gap).float()[:, None]
    shrink_v = beta2**gap
    root = v.sqrt()
    total = _rule_sum(root, tables.nodes[source], tables.weights[source], tables.eps)
    tail = (beta1**gap * torch.exp(-log_gain))[:, None] * tables.weights[step][None, :]
    total -= _rule_sum(root, shrink_v.sqrt()[:, None] * tables.nodes[step][None, :], tail, tables.eps)
    total = torch.where((gap <= SHORT_GAP)[:, None], _short_sum(root, source, gap, tables), total)
    missed = ((last > 0) & (gap > 0))[:, None]
    weight -= torch.where(missed, m * total, torch.zeros((), device=m.device))
    decay(weight, last, tables.log_decay, step)
    m *= torch.where(missed, shrink_m, torch.ones((), device=m.device))
    v *= torch.where(missed, shrink_v.float()[:, None], torch.ones((), device=m.device))


def _short_sum(root: torch.Tensor, source: torch.Tensor, gap: torch.Tensor, tables: AdamTables) -> torch.Tensor:
    """The sum over the first min(gap, SHORT_GAP) missed steps, term by term."""
    beta1, beta2 = tables.betas
    total = torch.zeros_like(root)
    for j in range(1, SHORT_GAP + 1):
        t = (source + j).clamp(max=len(tables.amplitude) - 1)
        a = tables.amplitude[t] * beta1**j * torch.exp(tables.log_decay[source] - tables.log_decay[t])
        a = torch.where(gap >= j, a, 0.0)
        total += a.float()[:, None] / (root * (beta2 ** (j / 2) * tables.spread[t]).float()[:, None] + tables.eps)
    return total


def _rule_sum(root: torch.Tensor, nodes: torch.Tensor, weights: torch.Tensor, eps: float) -> torch.Tensor:
    """sum_k weights[r, k] / (root[r, :] nodes[r, k] + eps), float32 (rows, width)."""
    x, a = nodes.float(), weights.float()
    total = torch.zeros_like(root)
    for k in range(x.shape[1]):
        total += a[:, k, None] / (root * x[:, k, None] + eps)
    return total


class AdamTables:
    """:class:`AdamRules` as float64 tensors on a device."""

    def __init__(self, rules: AdamRules, device: torch.device) -> None:
        self.nodes = torch.from_numpy(rules.nodes).to(device)
        self.weights = torch.from_numpy(rules.weights).to(device)
        self.log_decay = torch.from_numpy(rules.log_decay).to(device)
        self.amplitude = torch.from_numpy(rules.amplitude).to(device)
        self.spread = torch.from_numpy(rules.spread).to(device)
        self.betas, self.eps = rules.betas, rules.eps


def adamw_update(
    weight: torch.Tensor, state: State, grad: torch.Tensor, step: int, rate: float, weight_decay: float,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One AdamW step (Loshchilov and Hutter 2019), number ``step`` from 1, the arithmetic of ``torch.optim.AdamW``."""
    m, v = state
    beta1, beta2 = betas
    weight *= 1 - rate * weight_decay
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weight.addcdiv_(m, denominator, value=-rate / (1 - beta1**step))


def sgd_update(weight: torch.Tensor, grad: torch.Tensor, rate: float, weight_decay: float) -> None:
    """w <- w (1 - lr wd) - lr g."""
    weight.mul_(1 - rate * weight_decay).add_(grad, alpha=-rate)


def rowwise_adagrad_update(
    weight: torch.Tensor, state: State, grad: torch.Tensor, rate: float, weight_decay: float, eps: float
) -> None:
    """Adagrad with one accumulator a row, the mean of its squared gradients (as in FBGEMM and PyTorch-BigGraph)."""
    (accumulator,) = state
    accumulator += grad.square().mean(dim=1, keepdim=True)
    weight.mul_(1 - rate * weight_decay).sub_(rate * grad / (accumulator.sqrt() + eps))

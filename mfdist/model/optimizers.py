"""Row optimizers: what one step, and a gap without gradients, does to the rows of a table.

``adamw`` is exact: a row carries the step it was last brought to, and takes the steps it missed in closed form before
it is read (``kernels/missed_steps``). ``sparse_adam`` (torch.optim.SparseAdam) moves touched rows only,
``rowwise_adagrad`` and ``sgd`` have no momentum. Weight decay is decoupled and falls on every row at every step in all
of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from mfdist.errors import UsageError
from mfdist.kernels import reference
from mfdist.kernels.missed_steps import AdamRules, adam_rules

OPTIMIZERS = ("adamw", "sparse_adam", "rowwise_adagrad", "sgd")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """``total_steps`` ends the schedules: linear and cosine reach zero there. Steps count from 1."""

    kind: str
    lr: float
    total_steps: int
    lr_schedule: str = "constant"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        assert self.kind in OPTIMIZERS and self.lr_schedule in SCHEDULES
        if self.lr * self.weight_decay >= 1:
            raise UsageError(
                f"--lr {self.lr:g} times --weight-decay {self.weight_decay:g} is 1 or more: every step would wipe "
                "the tables; choose smaller ones."
            )

    def state_widths(self, width: int) -> tuple[int, ...]:
        """Columns of each state tensor of a row of ``width`` weights."""
        return {"adamw": (width, width), "sparse_adam": (width, width), "rowwise_adagrad": (1,), "sgd": ()}[self.kind]

    def rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        return self.lr if self.lr_schedule == "constant" else float(self._rates(np.array([step]))[0])

    def catch_up(self, weight: torch.Tensor, state: reference.State, last: torch.Tensor, step: int) -> None:
        """Bring gathered rows to the state after ``step``, in place; ``last`` is only read."""
        if self.kind == "adamw":
            reference.adamw_catch_up(weight, state, last, self._tables(weight.device), step)
        elif self.weight_decay:
            reference.decay(weight, last, self._tables(weight.device).log_decay, step)

    def update(self, weight: torch.Tensor, state: reference.State, grad: torch.Tensor, step: int) -> None:
        """Take ``step`` with ``grad`` on rows that stand after ``step - 1``, in place."""
        rate = self.rate(step)
        if weight.numel() == 1 and weight.device.type == "cpu" and self.kind in ("adamw", "sparse_adam"):
            self._update_one(weight, state, float(grad), step, rate)
        elif self.kind in ("adamw", "sparse_adam"):
            reference.adamw_update(weight, state, grad, step, rate, self.weight_decay, self.betas, self.eps)
        elif self.kind == "rowwise_adagrad":
            reference.rowwise_adagrad_update(weight, state, grad, rate, self.weight_decay, self.eps)
        else:
            reference.sgd_update(weight, grad, rate, self.weight_decay)

    def _update_one(self, weight: torch.Tensor, state: reference.State, grad: float, step: int, rate: float) -> None:
        """AdamW on a single number, by Python's own: torch's calls would take longer than a small batch's kernels."""
        (m, v), (beta1, beta2) = state, self.betas
        first = float(m) + (1 - beta1) * (grad - float(m))
        second = beta2 * float(v) + (1 - beta2) * grad * grad
        denominator = math.sqrt(second / (1 - beta2**step)) + self.eps
        weight.fill_(float(weight) * (1 - rate * self.weight_decay) - rate / (1 - beta1**step) * first / denominator)
        m.fill_(first)
        v.fill_(second)

    def _rates(self, step: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        done = np.minimum((step - 1) / max(self.total_steps, 1), 1.0)
        shape: dict[str, Callable[[], npt.NDArray[np.float64]]] = {
            "constant": lambda: np.ones(len(step)),
            "linear": lambda: 1 - done,
            "cosine": lambda: 0.5 * (1 + np.cos(math.pi * done)),
        }
        return self.lr * shape[self.lr_schedule]()

    @cached_property
    def rules(self) -> AdamRules:
        """The catch-up rules of the whole run (for the optimizers without momentum: its decay)."""
        betas = self.betas if self.kind == "adamw" else (0.0, 0.999)
        return adam_rules(self._rates, self.total_steps, betas, self.eps, self.weight_decay)

    def _tables(self, device: torch.device) -> reference.AdamTables:
        cache = self.__dict__.setdefault("_device_tables", {})
        if device not in cache:
            cache[device] = reference.AdamTables(self.rules, device)
        return cache[device]  # type: ignore[no-any-return]

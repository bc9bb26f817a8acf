"""What the AdamW steps without a gradient do to a row, summed in closed form instead of replayed.

A dense AdamW step t moves every row, touched or not (lr_t, decay d_t = 1 - lr_t wd):

    m <- b1 m,   v <- b2 v,   w <- w d_t - lr_t m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

A row last touched at step s and needed after step e = s + n has missed n of them. With D the running product of d,
and sv = sqrt(v) of the row at s,

    w_e = D_e / D_s (w_s - m_s S),      S = sum over j = 1..n of a_j / (sv x_j + eps),   t = s + j
    a_j = lr_t b1^j / (1 - b1^t) D_s / D_t,     x_j = sqrt(b2^j / (1 - b2^t))

a_j and x_j depend on (s, j) alone and die out geometrically, so the infinite sum from s is a Gauss quadrature of a few
nodes (Golub and Welsch 1969, by Lanczos on the discrete measure). A gap shorter than the horizon is the sum from s
minus the decayed sum from e:  x there is x sqrt(b2^n), a there is a b1^n D_s / D_e.

Worked example: b1 = 0.9, s = 100 and n = 2. The row takes two steps with weights a_1 = lr 0.9 / (1 - 0.9^101) / d and
a_2 = lr 0.81 / (1 - 0.9^102) / d^2; the rule gives (all that is left from s) - 0.81 / d^2 (all that is left from 102).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NODES = 10
"""Nodes of a rule: relative error of S below 1e-6 from the first step on, for any v (see tests/test_rules.py)."""
LATER_NODES = 4
"""Once the measure is so narrow that four nodes do, the rule becomes a polynomial (:meth:`AdamRules.polynomials`)."""
DEGREE = 6
RULE_ERROR = 3e-8
"""Relative error of S that four nodes and their polynomial may have to count as enough."""
SHORT_GAP = 2
"""Gaps up to this long are summed as they are. Longer ones are differences of two rules, which cancel by a factor of
1 / (1 - b1^gap): by 4 at most with b1 = 0.9."""
HORIZON_WEIGHT = 1e-9
"""The sum is cut where a_j has fallen below this share of a_1."""


@dataclass(frozen=True)
class AdamRules:
    """Rules for s = 0 .. steps, float64: ``nodes``/``weights`` (steps + 1, NODES), ``log_decay`` (steps + 1,) = log D.

    Row 0 is all zero weights: a row that was never touched has m = 0.
    """

    nodes: Floats
    weights: Floats
    log_decay: Floats
    betas: tuple[float, float]
    eps: float
    horizon: int
    amplitude: Floats
    spread: Floats
    """Of each step, lr_t / (1 - b1^t) and 1 / sqrt(1 - b2^t): a gap of up to SHORT_GAP steps is summed term by term."""
    plain_below: int
    """Rules before this step have NODES nodes, later ones LATER_NODES (the rest has weight zero)."""

    def polynomials(self) -> npt.NDArray[np.float32]:
        """The rules from ``plain_below`` on as polynomials, float32 (steps + 1, DEGREE + 2): c, p0, ..., p6.

        With q = sv c + eps and r = sv c / q in [0, 1), S = (p0 + p1 r + ... + p6 r^6) / q: nodes x_k = c (1 + z_k) make
        sv x_k + eps = q (1 + z_k r), and the sum of a_k / (1 + z_k r) is interpolated at Chebyshev's points. Rows
        before that step are zero.
        """
        found = np.zeros((len(self.nodes), DEGREE + 2))
        x, a = self.nodes[self.plain_below :, :LATER_NODES], self.weights[self.plain_below :, :LATER_NODES]
        found[self.plain_below :] = _polynomials(x, a)
        return found.astype(np.float32)


def _polynomials(x: Floats, a: Floats) -> Floats:
    """c and the coefficients, lowest power first, of the rules with nodes ``x`` and weights ``a`` (rules, nodes)."""
    total = a.sum(axis=1)
    some = total > 0
    centre = np.where(some, (a * x).sum(axis=1) / np.where(some, total, 1.0), 1.0)
    z = np.where(some[:, None], x / centre[:, None] - 1, 0.0)  # nothing left: 0, not 0 / (1 - r)
    points = (1 + np.cos((2 * np.arange(DEGREE + 1) + 1) * np.pi / (2 * DEGREE + 2))) / 2
    values = sum(a[:, k, None] / (1 + z[:, k, None] * points) for k in range(a.shape[1]))
    coefficients = np.linalg.solve(np.vander(points, increasing=True), np.asarray(values).T).T
    return np.column_stack([centre, coefficients])


def adam_rules(
    learning_rate: Callable[[npt.NDArray[np.int64]], Floats], steps: int, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> AdamRules:  # fmt: skip
    """The rules of a run of ``steps`` steps; ``learning_rate`` maps step numbers (1-based) to rates.

    Past the last step the schedule is taken as it would go on; those terms only ever cancel.
    """
    beta1, beta2 = betas
    horizon = horizon_of(betas)
    t = np.arange(1, steps + horizon + 1)
    rate = learning_rate(t)
    log_decay = np.concatenate([[0.0], np.cumsum(np.log1p(-rate * weight_decay))])
    nodes, weights = np.ones((steps + 1, NODES)), np.zeros((steps + 1, NODES))

    def measure(first: int, end: int) -> tuple[Floats, Floats]:
        s = np.arange(first, end)[:, None]
        j = np.arange(1, horizon + 1)[None, :]
        later = s + j
        a = rate[later - 1] * beta1**j / (1 - beta1**later) * np.exp(log_decay[s] - log_decay[later])
        return np.sqrt(beta2**j / (1 - beta2**later)), a

    until = np.arange(1, steps + 1)
    amplitude = np.concatenate([[0.0], rate[:steps] / (1 - beta1**until)])
    spread = np.concatenate([[0.0], 1 / np.sqrt(1 - beta2**until)])
    plain_below = next((s for s in (32, 64, 128, 256, 512) if s <= steps and _four_do(*measure(s, s + 1))), steps + 1)
    for first, end in _stretches(plain_below, steps + 1):
        size = NODES if first < plain_below else LATER_NODES
        nodes[first:end, :size], weights[first:end, :size] = gauss_rules(*measure(first, end), size)
    return AdamRules(nodes, weights, log_decay[: steps + 1], betas, eps, horizon, amplitude, spread, plain_below)


def _stretches(boundary: int, end: int) -> list[tuple[int, int]]:
    """[1, end) in pieces of at most 4096, with a cut at ``boundary``."""
    cuts = sorted({*range(1, end, 4096), min(boundary, end), end})
    return list(pairwise(cuts))


def _four_do(x: Floats, a: Floats) -> bool:
    """Whether LATER_NODES nodes and their polynomial give S of this measure as exactly as float32 needs, for any
    sqrt(v) (eps = 1)."""
    root = 10.0 ** np.arange(-3, 9, 0.25)[:, None]
    exact = (a / (root * x + 1)).sum(axis=1)
    nodes, weights = gauss_rules(x, a, LATER_NODES)
    centre, *coefficients = _polynomials(nodes, weights)[0]
    r = root * centre / (root * centre + 1)
    found = np.polyval(coefficients[::-1], r[:, 0]) / (root[:, 0] * centre + 1)
    return bool(np.abs(found - exact).max() <= RULE_ERROR * exact.max()) and bool(
        (np.abs(found / np.where(exact > 0, exact, 1.0) - 1) <= 10 * RULE_ERROR).all()
    )


def horizon_of(betas: tuple[float, float]) -> int:
    """Missed steps after which the momentum no longer moves a row: (b1 / sqrt(b2))^n < HORIZON_WEIGHT."""
    ratio = betas[0] / np.sqrt(betas[1]) if betas[1] > 0 else 0.0
    ratio = min(max(float(ratio), betas[0]), 0.9999)
    return int(np.ceil(np.log(HORIZON_WEIGHT) / np.log(ratio))) if ratio > 0 else 1


def gauss_rules(x: Floats, a: Floats, size: int) -> tuple[Floats, Floats]:
    """Gauss rules of ``size`` nodes for the measures sum_j a[r, j] delta(x[r, j]); both (rules, points).

    Returns nodes and weights, (rules, size). A measure so narrow that Lanczos breaks down gets as many nodes as it
    has, the rest with weight zero.
    """
    rules, points = x.shape
    total = a.sum(axis=1)
    safe = np.where(total > 0, total, 1.0)
    centre = (a * x).sum(axis=1) / safe
    spread = x - centre[:, None]
    basis = np.zeros((size, rules, points))
    basis[0] = np.sqrt(a / safe[:, None])
    tri = np.zeros((rules, size, size))
    alive = total > 0
    for k in range(size):
        vector = spread * basis[k]
        tri[:, k, k] = (basis[k] * vector).sum(axis=1)
        for _ in range(2):  # twice is enough (Kahan): full orthogonality
            for other in basis[: k + 1]:
                vector -= (other * vector).sum(axis=1)[:, None] * other
        if k + 1 == size:
            break
        norm = np.sqrt((vector**2).sum(axis=1))
        alive &= norm > 1e-12 * np.maximum(np.abs(spread).max(axis=1), 1e-300)
        basis[k + 1] = np.where(alive[:, None], vector / np.where(norm > 0, norm, 1.0)[:, None], 0.0)
        tri[:, k, k + 1] = tri[:, k + 1, k] = np.where(alive, norm, 0.0)
    values, vectors = np.linalg.eigh(tri)
    return centre[:, None] + values, total[:, None] * vectors[:, 0, :] ** 2

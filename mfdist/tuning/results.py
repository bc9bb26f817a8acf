"""What a search has found, as plain values, and its lines on the console."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfdist import storage
from mfdist.tuning.course import Measure
from mfdist.tuning.space import Parameter, Value

BEST, PAGE, RESULT = "best.toml", "tune.html", "tune.json"
"""Files of a search for ``train --config``, for people and for programs."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """``values`` by names of parameters; ``errors``: the measure's value on each split that it came through; ``error``:
    their mean, None where it was ended early, and ``why`` says so."""

    number: int
    values: Mapping[str, Value]
    errors: tuple[float, ...]
    error: float | None
    seconds: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """``trials`` in their order; ``start``: the one that changes nothing; ``settings``: of the best, flags of training
    by field name; ``splits``: numbers of ratings to learn from and held out; ``split_kind``: how they were held out."""

    dataset: str
    measure: Measure
    parameters: tuple[Parameter, ...]
    trials: tuple[Trial, ...]
    best: Trial | None
    start: Trial | None
    settings: Mapping[str, Any]
    splits: tuple[Mapping[str, int], ...]
    split_kind: str

    def shown(self, value: float | None) -> str:
        """A value of the measure as people know it."""
        return "-" if value is None else f"{self.measure.figure(value):.4f}"

    def spread(self, trial: Trial) -> str:
        """How far the splits of a trial lie apart; nothing of one split."""
        return f" +- {statistics.stdev(trial.errors):.4f}" if len(trial.errors) > 1 else ""

    def values_of(self, trial: Trial) -> str:
        return ", ".join(f"{one.flag} {one.shown(trial.values[one.name])}" for one in self.parameters)

    def change(self, gain: float) -> str:
        """By how much the measure's figure has changed where it is better by ``gain``."""
        return f"{-self.measure.sign * gain:+.4f}"

    def gains(self) -> list[float] | None:
        """Of each split, by how much the best is better than the start; None where one of them is not there."""
        if self.best is None or self.start is None or self.start.error is None:
            return None
        return [before - after for before, after in zip(self.start.errors, self.best.errors, strict=True)]


def trial_line(results: Results, trial: Trial, trials: int) -> str:
    """The line of a finished trial."""
    said = trial.why or f"{results.measure.label} {results.shown(trial.error)}{results.spread(trial)}"
    mark = " <- the best so far" if results.best is trial and len(results.trials) > 1 else ""
    return f"trial {trial.number}/{trials} | {said} | {results.values_of(trial)} | {trial.seconds:.1f} s{mark}"


def last_words(results: Results, data: str, run: str) -> list[str]:
    """What was found, and what to do with it."""
    best = results.best
    assert best is not None
    early = sum(bool(trial.why) for trial in results.trials)
    lines = [
        f"best:   trial {best.number} of {len(results.trials)} ({early} ended early): {results.measure.label} "
        f"{results.shown(best.error)} on the inner splits, with {results.values_of(best)}"
    ]
    gains = results.gains()
    if gains is not None and results.start is not best:
        begun = results.shown(results.start.error if results.start else None)
        lines.append(f"        where it began: {begun}; on each split {', '.join(map(results.change, gains))}")
    if gains is not None and results.start is best:
        lines.append("        nothing was better than the settings that it began with")
    lines.append(f"page: {storage.join(storage.redact(run), PAGE)}; next, for example")
    lines.append(f"    {train_command(data, run)}")
    return lines


def train_command(data: str, run: str) -> str:
    """How to train with the best on all training rows."""
    best, data = (shlex.quote(storage.redact(path)) for path in (storage.join(run, BEST), data))
    return f"mfdist train --data {data} --config {best} --run-dir runs/tuned"

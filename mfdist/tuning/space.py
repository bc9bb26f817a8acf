"""What a search tries: settings of training by name, with a range, choices, or multiples of what they are.

    lr=0.005:0.1            between these, evenly on a logarithmic scale where the ends are far apart
    emb-dim=32,64,128       one of these
    l2=x0.3:x3              between 0.3 and 3 times what it would be
    epochs                  between 0.5 and 1.5 times what it would be (most others: 0.3 to 3)

A multiple goes beside any setting that is a number, or several; also one that follows from the data, which is another
number on an inner split than on all training rows. There the multiple is what is carried over.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfdist.config import value_of
from mfdist.errors import UsageError
from mfdist.flag_names import nearest
from mfdist.training.config import TrainConfig

SEARCHED = ("model", "optimization")
"""Groups of flags that can be searched."""
LEFT_OUT = ("init_from", "patience", "objective", "betas", "sigmoid_range")
MULTIPLES = {
    "lr": (0.3, 3.0), "epochs": (0.5, 1.5), "l2": (0.3, 3.0), "row_l2": (0.3, 3.0), "implicit": (0.3, 2.0),
    "weight_decay": (0.1, 10.0), "init_std": (0.5, 2.0),
}  # fmt: skip
"""What is searched where nothing is named, of learning ratings: multiples, of settings that are not 0."""
MULTIPLES_OF_RANKING = {"unobserved_weight": (0.2, 5.0), "ranking_penalty": (0.3, 3.0), "epochs": (0.5, 1.5)}
ANY_MULTIPLE = (0.3, 3.0)
FAR_APART = 4.0
"""A range whose ends differ by this factor is searched on a logarithmic scale."""
NUMBER = r"(x?)(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)"

Value = Any
Fit = Callable[[TrainConfig], TrainConfig]
"""A configuration with what follows from the ratings of a dataset."""


@dataclass(frozen=True)
class Parameter:
    """A setting that is searched: from ``low`` to ``high``, or one of ``choices`` (texts). ``times``: as a multiple."""

    field: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()
    times: bool = False
    whole: bool = False

    @property
    def flag(self) -> str:
        return self.field.replace("_", "-")

    @property
    def name(self) -> str:
        """As the store of trials calls it."""
        return self.flag + (" x" if self.times else "")

    @property
    def logarithmic(self) -> bool:
        return not self.choices and self.low > 0 and self.high >= FAR_APART * self.low

    def suggest(self, trial: Any) -> Value:
        """The value that Optuna's ``trial`` has of it: a number, or one of the choices."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.logarithmic)
        return _short(trial.suggest_float(self.name, self.low, self.high, log=self.logarithmic))

    def shown(self, value: Value) -> str:
        text = value if isinstance(value, str) else f"{value:.4g}"
        return f"x{text}" if self.times else text

    def number(self, value: Value) -> float:
        """Where a value stands on an axis: itself, or the place of a choice from 1."""
        return self.choices.index(value) + 1.0 if self.choices else float(value)


def parse_search(words: Sequence[str]) -> tuple[Parameter, ...]:
    """The parameters of --search; UsageError names the word that is wrong, and what to give."""
    found = tuple(map(_parse, words))
    for name in {one.field for one in found}:
        if sum(one.field == name for one in found) > 1:
            raise UsageError(f"--search names {name.replace('_', '-')} more than once.")
    return found


def space_of(words: Sequence[str], beginning: TrainConfig) -> tuple[Parameter, ...]:
    """What is searched from ``beginning``, a configuration with what follows from the data: UsageError where a multiple
    of 0 is asked for. Where no words are given, those of MULTIPLES that are not 0."""
    if words:
        found = parse_search(words)
        for one in found:
            if one.times and not _some(getattr(beginning, one.field)):
                raise UsageError(f"--search {one.flag}: it is 0 or not set to begin with, and a multiple of that is "
                                 "nothing else; give it a range of values.")  # fmt: skip
        return found
    multiples = MULTIPLES_OF_RANKING if beginning.is_ranking else MULTIPLES
    return tuple(Parameter(name, low, high, times=True) for name, (low, high) in multiples.items()
                 if _some(getattr(beginning, name)))  # fmt: skip


def settings_of(given: Mapping[str, Any], chosen: Mapping[Parameter, Value], fit: Fit) -> dict[str, Any]:
    """Flags of training by field name: those ``given``, and what is chosen. UsageError where they do not go together.

    Multiples are of what a flag is without them, and of what follows from the data (``fit``) with all the others set.
    """
    settings = {**given, **{one.field: _value(one, value) for one, value in chosen.items() if not one.times}}
    plain = TrainConfig(**settings)
    fitted = fit(plain)
    multiples = {one.field: float(value) for one, value in chosen.items() if one.times}
    of_the_data = {name for name in multiples if getattr(plain, name) != getattr(fitted, name)}
    for name in multiples.keys() - of_the_data:
        settings[name] = times(getattr(plain, name), multiples[name])
    if of_the_data:
        fitted = fit(TrainConfig(**settings))
        settings |= {name: times(getattr(fitted, name), multiples[name]) for name in of_the_data}
    return settings


def start_of(parameters: Sequence[Parameter], beginning: TrainConfig) -> dict[str, Value] | None:
    """The trial that changes nothing, by names of parameters; None where it lies outside of what is searched."""
    found: dict[str, Value] = {}
    for one in parameters:
        value: Any = 1.0 if one.times else getattr(beginning, one.field)
        if one.choices:
            same = [text for text in one.choices if (float(text) if one.times else _value(one, text)) == value]
            if not same:
                return None
            found[one.name] = same[0]
        elif not one.low <= value <= one.high:
            return None
        else:
            found[one.name] = int(value) if one.whole else _short(value)
    return found


def times(value: Any, factor: float) -> Any:
    """A number, or several, ``factor`` times: whole numbers stay whole and at least 1, others get four digits."""
    if isinstance(value, tuple):
        return tuple(times(float(part), factor) for part in value)
    return max(1, round(value * factor)) if isinstance(value, int) else _short(value * factor)


# Inside -------------------------------------------------------------------------------------------


def _parse(word: str) -> Parameter:
    name, equals, text = word.partition("=")
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(TrainConfig)
              if f.metadata["group"] in SEARCHED and f.name not in LEFT_OUT}  # fmt: skip
    plain = name.strip().lstrip("-").replace("_", "-")
    if plain not in fields:
        raise UsageError(f"--search {word}: there is no setting '{name}' to search.{nearest(name, list(fields))}")
    field = fields[plain].name
    kind = typing.get_type_hints(TrainConfig)[field]
    numbers = kind in (int, float)
    if not equals:
        if not numbers and field not in MULTIPLES:
            raise UsageError(f"--search {word}: it is no number; give its values, such as {plain}=A,B.")
        low, high = {**MULTIPLES_OF_RANKING, **MULTIPLES}.get(field, ANY_MULTIPLE)
        return Parameter(field, low, high, times=True)
    span = re.fullmatch(f"{NUMBER}:{NUMBER}", text)
    if span and (span[1] == span[3]) and (numbers or (span[1] and field in MULTIPLES)):
        low, high = float(span[2]), float(span[4])
        if not low < high < math.inf:
            raise UsageError(f"--search {word}: expected LOW:HIGH with LOW below HIGH, and both finite.")
        if not span[1]:
            low, high = (float(value_of(TrainConfig, field, end)) for end in (span[2], span[4]))
        return Parameter(field, low, high, times=bool(span[1]), whole=kind is int and not span[1])
    choices = tuple(part.strip() for part in text.split(","))
    multiples = [re.fullmatch(NUMBER, part) for part in choices]
    if all(found and found[1] for found in multiples) and (numbers or field in MULTIPLES):
        return Parameter(field, choices=tuple(part[1:] for part in choices), times=True)
    if ":" in text or (field in MULTIPLES and not numbers) or not all(choices) or len(set(choices)) < len(choices):
        raise UsageError(f"--search {word}: expected {_forms(plain, numbers, field)}.")
    for part in choices:
        value_of(TrainConfig, field, part)
    return Parameter(field, choices=choices)


def _forms(name: str, numbers: bool, field: str) -> str:
    several = f"{name}=x0.3:x3, multiples of what it is"
    return f"{name}=LOW:HIGH, {name}=A,B,C or {several}" if numbers else several if field in MULTIPLES else (
        f"{name}=A,B")  # fmt: skip


def _value(one: Parameter, value: Value) -> Any:
    """What a flag is set to by a value that is no multiple."""
    return value_of(TrainConfig, one.field, value if isinstance(value, str) else repr(value))


def _some(value: Any) -> bool:
    """Whether multiples of a value differ: not of 0, of nothing, and of all zeros."""
    return any(map(_some, value)) if isinstance(value, tuple) else bool(value) and math.isfinite(value)


def _short(value: float) -> float:
    """Four digits of it: what a file of settings shows is what was used."""
    return float(f"{value:.4g}")

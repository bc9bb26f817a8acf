"""JSON that may come from anywhere, read into the types that the code counts on.

:func:`read` gives the object of a file, :func:`typed` its values as a type hint says, nested as deep as that goes:

>>> typed(dict[str, tuple[int, ...]], {"a": [1, 2]}, "")
{'a': (1, 2)}
>>> typed(dict[str, tuple[int, ...]], {"a": [1, True]}, "lanes")
Traceback (most recent call last):
ValueError: lanes.a[1] is true, expected a whole number
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from mfdist import storage
from mfdist.errors import DataError

MOST_WHOLE = 2**63 - 1
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read(path: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError where there is none; DataError, ending with ``remedy``, where it is
    something else."""
    content = storage.read_bytes(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON: {short(error)}", remedy) from None
    if not isinstance(found, dict):
        raise damaged(path, "not a JSON object", remedy)
    return found


def field(path: str, key: str, kind: Any, remedy: str) -> Any:
    """One value of the JSON object in a file, as :func:`typed`; errors as :func:`read`."""
    table = read(path, remedy)
    try:
        if key not in table:
            raise ValueError(f"it has no {key}")
        return typed(kind, table[key], key)
    except ValueError as error:
        raise damaged(path, error, remedy) from None


def damaged(path: str, why: object, remedy: str) -> DataError:
    """The error for a file that is not what it should be."""
    return DataError(f"{storage.redact(path)} is damaged ({why}); {remedy}.")


def typed(kind: Any, value: Any, where: str) -> Any:
    """``value`` of JSON as the type ``kind``: plain types, dataclasses, ``tuple``, ``list``, ``dict``, ``X | None``.

    Lists become tuples where ``kind`` says so, whole numbers floats. Text is such that UTF-8 can hold it. ValueError
    names the place, below ``where``, and what stands there.
    """
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else typed(next(each for each in inner if each is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is dict:
        return {key: typed(inner[1], each, f"{where}.{key}") for key, each in _table(value, where).items()}
    if origin in (list, tuple):
        return _sequence(origin, inner, value, where)
    return _plain(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    table, hints = _table(value, where), typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise ValueError(f"{_place(where)} has an unknown key {short(unknown[0])}")
    for name, field in fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in table and not optional:
            raise ValueError(f"{_place(where)} has no {name}")
    values = {name: typed(hints[name], each, f"{where}.{name}" if where else name) for name, each in table.items()}
    return kind(**values)


def _sequence(origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{_place(where)} is {short(value)}, expected a list")
    if origin is tuple and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            raise ValueError(f"{_place(where)} has {len(value)} values, expected {len(inner)}")
        kinds = inner
    else:
        kinds = (inner[0],) * len(value)
    return origin(typed(each, one, f"{where}[{k}]") for k, (each, one) in enumerate(zip(kinds, value, strict=True)))


def _plain(kind: type, value: Any, where: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number if kind is float else isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind in (int, float) and isinstance(value, int) and fits:
        fits = abs(value) <= MOST_WHOLE
    if kind is str and fits:
        fits = not any("\ud800" <= letter <= "\udfff" for letter in value)
    if not fits:
        raise ValueError(f"{_place(where)} is {short(value)}, expected {_NAMES[kind]}")
    return float(value) if kind is float else value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_place(where)} is {short(value)}, expected an object")
    return value


def _place(where: str) -> str:
    return where or "it"


def short(value: Any) -> str:
    """What stands in a file, or an error of it, at a length for a sentence."""
    text = str(value) if isinstance(value, Exception) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Flat flags: one frozen dataclass a job, read from ``--config FILE.toml`` and the command line.

A job declares its flags as dataclass fields made by :func:`flag`; positional arguments by :func:`positional`.
The field ``batch_size`` is the flag ``--batch-size`` and the TOML key ``batch-size`` (or ``batch_size``).
Precedence: default < TOML file < command line. Unknown keys and bad values are a :class:`UsageError`
before anything else happens. ``__post_init__`` of the dataclass holds the checks that need several fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from mfdist import storage
from mfdist.errors import UsageError
from mfdist.flag_names import nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C")
GROUPS = (
    "what to plan for", "data", "validation rows", "layout", "an existing dataset", "model", "optimization", "run",
    "cluster",
)  # fmt: skip
"""The order of headings."""
_READY = importlib.resources.files("mfdist") / "configs"


@dataclasses.dataclass(frozen=True)
class Follows:
    """The default of a flag that follows from others, settled in ``__post_init__``; ``text`` is what --help says."""

    text: str

    def __str__(self) -> str:
        return self.text


def flag(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] | None = None,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    many: bool = False,
    group: str = "",
    basic: bool = False,
    metavar: str = "",
    example: str = "",
) -> Any:
    """A dataclass field that is a flag. ``help`` states meaning and unit; the default is added to it.

    ``group``: the heading that it stands under, of GROUPS. ``basic``: ``--help`` shows it; where no flag of a job is
    basic it shows them all. ``metavar``: what stands for the value, its unit or kind; ``example``: a value.

    ``parse`` turns the text of the command line or of a TOML string into the value and raises ValueError
    with a sentence; without it the field's type decides (int, float, str, bool). ``many``: one or more values.
    """
    meta = {"help": help, "parse": parse, "choices": tuple(choices), "at_least": at_least, "above": above,
            "at_most": at_most, "many": many, "positional": False, "group": group, "basic": basic,
            "metavar": metavar, "example": example}  # fmt: skip
    return dataclasses.field(default=default, metadata=meta)


def positional(help: str, *, optional: bool = False) -> Any:
    """A dataclass field (tuple of str) that takes the arguments without a flag."""
    return dataclasses.field(default=(), metadata={"help": help, "positional": True, "optional": optional})


def parse_config(cls: type[C], argv: Sequence[str] | None, description: str, prog: str | None = None) -> C:
    """Read ``argv`` (``sys.argv[1:]`` when None) into ``cls``; UsageError names the flag and the remedy.

    All ranks of a host read the same flags: the first of them says what is wrong.
    """
    try:
        if sys.platform == "win32":
            raise UsageError("mfdist runs on Linux; on Windows, start it inside WSL.")
        return _parse(cls, argv, description, prog)
    except UsageError as error:
        error.said_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _parse(cls: type[C], argv: Sequence[str] | None, description: str, prog: str | None) -> C:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _build_parser(cls, description, prog, everything="--help-all" in words)
    given = vars(parser.parse_args(words))
    config_file = given.pop("config", None)
    values = read_toml(cls, config_file) if config_file else {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in given:
            values[field.name] = _convert(field, given[field.name], _flag_name(field.name), cls)
    return cls(**values)


def read_toml(cls: type[Any], path: str, flag: str = "--config") -> dict[str, Any]:
    """The values that a TOML file, or a ready configuration given by its name, sets for ``cls``, checked; ``flag`` is
    the one that names it."""
    try:
        table = tomllib.loads(_text_of(path))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"{flag} {path}: there is no such file, and no ready configuration of this name ({', '.join(ready())})."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path} is not valid TOML: {error}.") from None
    return _values_of(cls, table, path)


def read_ready(cls: type[Any], name: str) -> dict[str, Any]:
    """The same of a ready configuration, whatever files of this name stand in the working directory."""
    return _values_of(cls, ready_values(name), name)


def _values_of(cls: type[Any], table: Mapping[str, Any], path: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UsageError(f"{path}: unknown key '{key}'.{nearest(key, [_flag_name(n)[2:] for n in fields])}")
        values[name] = _convert(fields[name], value, f"{path}: {key}", cls)
    return values


def value_of(cls: type[Any], name: str, text: str) -> Any:
    """What ``text`` sets the flag of the field ``name`` to, checked; of a switch, true or false."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    switch = _plain_type(typing.get_type_hints(cls)[name]) is bool
    value = {"true": True, "false": False}.get(text, text) if switch else text
    return _convert(field, value, _flag_name(name), cls)


def ready_values(name: str) -> dict[str, Any]:
    """The values of a ready configuration as TOML gives them, by field name."""
    table = tomllib.loads((_READY / f"{name}.toml").read_text(encoding="utf-8"))
    return {key.replace("-", "_"): value for key, value in table.items()}


def ready() -> list[str]:
    """Names of the ready configurations that come with the package (``--config NAME``)."""
    return sorted(file.name.removesuffix(".toml") for file in _READY.iterdir() if file.name.endswith(".toml"))


def _text_of(path: str) -> str:
    name = path.removesuffix(".toml")
    if name in ready() and (not storage.exists(path) or storage.is_dir(path)):
        return (_READY / f"{name}.toml").read_text(encoding="utf-8")
    return storage.read_text(path)


def to_toml(config: Any) -> str:
    """Every key of ``config`` as TOML that :func:`read_toml` reads back; URLs are redacted."""
    return toml_of({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def toml_of(values: Mapping[str, Any]) -> str:
    """The same of some values by field name."""
    keys = {_flag_name(name)[2:]: value for name, value in values.items()}
    lines = [f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def to_dict(config: Any) -> dict[str, Any]:
    """Every key of ``config`` as plain JSON values; URLs are redacted."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


# Parsers of values with units --------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """'4GiB', '512 MB', '1048576' as bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError("expected a size such as 512MiB or 4GiB")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMGT".index(prefix.upper() or " "))


def parse_pair(text: str) -> tuple[float, float]:
    """'0.9,0.999' as two numbers."""
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError("expected two numbers with a comma between them")
    return float(parts[0]), float(parts[1])


def parse_range(text: str) -> tuple[float, float]:
    """'0.5,5.5' as a low and a higher number."""
    low, high = parse_pair(text)
    if not low < high:
        raise ValueError("expected LOW,HIGH with LOW below HIGH")
    return low, high


# Inside -------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        hint = nearest(unknown[1].split("=")[0], list(self._option_string_actions)) if unknown else ""
        raise UsageError(f"{message}.{hint} See {self.prog} --help.")


def _build_parser(cls: type[Any], description: str, prog: str | None, everything: bool) -> argparse.ArgumentParser:
    """``everything``: --help shows all flags, not only the basic ones."""
    shown_fields = [f for f in dataclasses.fields(cls) if everything or f.metadata["positional"] or is_basic(cls, f)]
    hidden = len(dataclasses.fields(cls)) - len(shown_fields)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, add_help=False, usage=_usage(cls),
                     formatter_class=_Formatter,
                     epilog=f"{hidden} more flags: --help-all shows them." if hidden else None)  # fmt: skip
    parser._positionals.title = "arguments"
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata["positional"]:
            meta = field.metadata
            parser.add_argument(field.name, nargs="*" if meta["optional"] else "+", help=meta["help"],
                                metavar=field.name.rstrip("s").upper(), default=argparse.SUPPRESS)  # fmt: skip
    for title, members in groups(cls).items():
        section = parser.add_argument_group(title)
        for field in members:
            text = described(field).replace("%", "%%") if field in shown_fields else argparse.SUPPRESS
            name, many = _flag_name(field.name), "+" if field.metadata["many"] else None
            if _plain_type(hints[field.name]) is bool:
                section.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            else:
                section.add_argument(name, dest=field.name, metavar=metavar_of(field), help=text, nargs=many,
                                     default=argparse.SUPPRESS)  # fmt: skip
    section = parser.add_argument_group("help and files of flags")
    section.add_argument("--config", metavar="FILE.toml|NAME", default=argparse.SUPPRESS, help=config_help(cls))
    section.add_argument("-h", "--help", action="help", help="show the basic flags" if hidden else "show the flags")
    section.add_argument("--help-all", action="help", help="show every flag")
    return parser


def groups(cls: type[Any]) -> dict[str, list[dataclasses.Field[Any]]]:
    """The flags of a job by their headings, as help and documents show them: basic ones first."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(cls):
        if not field.metadata["positional"]:
            found.setdefault(field.metadata["group"] or "flags", []).append(field)
    titles = sorted(found, key=lambda title: GROUPS.index(title) if title in GROUPS else len(GROUPS))
    return {title: sorted(found[title], key=lambda field: not is_basic(cls, field)) for title in titles}


def is_basic(cls: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Whether ``--help`` shows a flag."""
    return field.metadata.get("basic", False) or not any(f.metadata.get("basic") for f in dataclasses.fields(cls))


def described(field: dataclasses.Field[Any]) -> str:
    """What help says of a flag: meaning, example, default."""
    meta, default = field.metadata, shown(field.default)
    example = f", such as {meta['example']}" if meta["example"] else ""
    if isinstance(field.default, bool) or not default or (field.default is None and "not set" in meta["help"]):
        return f"{meta['help']}{example}"
    return f"{meta['help']}{example} (default: {default})"


def metavar_of(field: dataclasses.Field[Any]) -> str:
    """What stands for a flag's value."""
    meta = field.metadata
    return "|".join(meta["choices"]) or meta["metavar"] or field.name.upper().split("_")[-1]


def config_help(cls: type[Any]) -> str:
    """What help says of ``--config``."""
    known = {name for name in ready() if ready_values(name).keys() <= {field.name for field in dataclasses.fields(cls)}}
    named = f", or a ready one by its name ({', '.join(sorted(known))})" if known else ""
    return f"a TOML file that sets any of these flags{named}; the command line wins"


def _usage(cls: type[Any]) -> str:
    named = [(f.name.rstrip("s").upper(), f.metadata["optional"]) for f in dataclasses.fields(cls)
             if f.metadata["positional"]]  # fmt: skip
    return " ".join(["%(prog)s", *(f"[{name} ...]" if free else f"{name} [...]" for name, free in named), "[flags]"])


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Flags in a column of their own, texts beside them."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def _convert(field: dataclasses.Field[Any], value: Any, where: str, cls: type[Any]) -> Any:
    meta = field.metadata
    if meta["positional"] or meta["many"]:
        values = [value] if isinstance(value, str) else list(value)
        if not all(isinstance(v, str) for v in values):
            raise UsageError(f"{where}: expected text, got {value!r}.")
        return tuple(values)
    try:
        if meta["parse"] is not None:
            if isinstance(value, list):
                value = ",".join(str(v) for v in value)
            return meta["parse"](str(value))
        kind = _plain_type(typing.get_type_hints(cls)[field.name])
        return _checked(_typed(kind, value), meta)
    except ValueError as error:
        raise UsageError(f"{where}: {error}, got {value!r}.") from None


def _typed(kind: type, value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if isinstance(value, bool):
        raise ValueError(f"expected {_KIND_NAMES[kind]}")
    if kind is str:
        if not isinstance(value, str):
            raise ValueError("expected text")
        return value
    try:
        number = float(value) if kind is float else _whole(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected {_KIND_NAMES[kind]}") from None
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text"}


def _whole(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, int) or re.fullmatch(r"[+-]?\d+", str(value)) else int(number)


def _checked(value: Any, meta: Any) -> Any:
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"expected one of {', '.join(meta['choices'])}")
    for name, holds, words in (("at_least", operator.ge, "at least"), ("above", operator.gt, "above"),
                               ("at_most", operator.le, "at most")):  # fmt: skip
        if meta[name] is not None and not holds(value, meta[name]):
            raise ValueError(f"expected a number {words} {meta[name]}")
    return value


def _plain_type(hint: Any) -> type:
    """``int`` of ``int | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint  # type: ignore[no-any-return]


def _flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def shown(default: Any) -> str:
    """A default as help and documents show it."""
    if isinstance(default, tuple):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
    return "not set" if default is None else str(default)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return storage.redact(value) if isinstance(value, str) else value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        if all(isinstance(v, (int, float)) for v in value):
            return '"' + ",".join(repr(v) for v in value) + '"'
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        text = storage.redact(value).replace("\\", "\\\\").replace('"', '\\"')
        return f'"{text}"'
    return repr(value)

"""Who imports whom: one table of rooms, no circle inside a room, light imports, one caller of process groups."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mfdist"

TOP = "errors storage config log metrics compilation loading process json_tables"
ROOMS = {
    "kernels": "",
    "cluster": f"kernels {TOP}",
    "data": f"kernels {TOP}",
    "pages": TOP,
    "prepare": f"pages data kernels {TOP}",
    "prepare_spark": f"prepare data kernels {TOP}",
    "model": f"data cluster kernels {TOP}",
    "run": f"data cluster {TOP}",
    "results": f"prepare pages run model data cluster kernels {TOP}",
    "synthetic": f"prepare data kernels {TOP}",
    "baseline": f"results run data cluster {TOP}",
    "training": f"results synthetic run model data cluster kernels {TOP}",
    "planning": f"training results synthetic prepare run model data cluster kernels {TOP}",
    "tuning": f"flag_names training results synthetic prepare pages run model data cluster kernels {TOP}",
    "api": f"results prepare data {TOP}",
    "jobs": f"tuning planning training baseline results synthetic prepare_spark prepare run model data "
    f"cluster kernels api {TOP}",
    "errors": "process",
    "storage": "errors",
    "config": "errors storage flag_names",
    "flag_names": "",
    "compilation": "",
    "loading": "",
    "log": "errors storage compilation process",
    "metrics": "",
    "launch": "cluster errors loading process",
    "process": "",
    "json_tables": "errors storage",
    "__main__": f"jobs cluster {TOP}",
    "__init__": "api",
}
"""Room or top-level module of mfdist -> what it may import, what is imported lazily included."""


def room_of(module: str) -> str:
    """The room of a dotted module below mfdist: its first word."""
    return module.split(".")[0]


def modules() -> dict[str, Path]:
    """Dotted names below mfdist, such as ``data.loader`` and ``errors``; a room itself is its ``__init__``."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(source: str) -> set[str]:
    """Dotted names below mfdist that a source file imports, anywhere in it; the last word may be a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("mfdist.") for alias in node.names if alias.name.startswith("mfdist.")}
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError("relative imports hide their room; write mfdist.<room>")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mfdist":
            prefix = (node.module or "")[len("mfdist.") :]
            names |= {f"{prefix}.{alias.name}".strip(".") for alias in node.names}
    return names - {"__version__"}


def resolved(name: str, known: dict[str, Path]) -> str:
    """The module that an imported name belongs to."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def arrows() -> dict[str, set[str]]:
    """Module -> modules it imports."""
    known = modules()
    return {
        name: {found for other in imported(path.read_text()) if (found := resolved(other, known)) and found != name}
        for name, path in known.items()
    }


def test_every_module_has_a_room() -> None:
    assert {room_of(name) for name in modules()} - set(ROOMS) == set()
    assert all(name.count(".") <= 1 for name in modules())


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed = {room, *ROOMS[room].split()}
    for name, others in arrows().items():
        for other in others if room_of(name) == room else ():
            assert room_of(other) in allowed, f"mfdist.{name} imports mfdist.{other}"


def test_rooms_have_no_circle() -> None:
    list(TopologicalSorter({room: ROOMS[room].split() for room in ROOMS}).static_order())


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_circle_inside_a_room(room: str) -> None:
    inside = {
        name: {other for other in others if room_of(other) == room}
        for name, others in arrows().items()
        if room_of(name) == room
    }
    list(TopologicalSorter(inside).static_order())


@pytest.mark.parametrize("room", sorted(name for name in ROOMS if (PACKAGE / name / "__init__.py").exists()))
def test_a_room_says_what_enters_and_what_leaves(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert all(word in text for word in ("Enters:", "Leaves:", "May import:"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mfdist.training.train", {"training.train"}),
        ("from mfdist import storage, api as a", {"storage", "api"}),
        ("from mfdist.kernels.reference import step", {"kernels.reference.step"}),
        ("def f():\n    if x:\n        from mfdist.run import lease", {"run.lease"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert imported(source) == expected


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
import {module}
"""


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("mfdist.training.train", {"polars", "pydantic", "surprise"}),
        ("mfdist", {"torch", "polars", "numba", "numpy", "pyarrow"}),
    ],
)
def test_light_imports(module: str, blocked: set[str]) -> None:
    code = BLOCKED.format(blocked=blocked, module=module)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


COLLECTIVES = re.compile(
    r"\bdist\.(init_process_group|destroy_process_group|new_group|barrier|i?send|i?recv|(all_)?(reduce|gather|to_all)\w*|"
    r"scatter\w*|broadcast\w*)\("
)


def test_only_the_world_calls_process_groups() -> None:
    """Everything else goes through it."""
    assert COLLECTIVES.search((PACKAGE / "cluster/world.py").read_text())
    for name, path in modules().items():
        found = COLLECTIVES.search(path.read_text())
        assert name == "cluster.world" or not found, f"mfdist.{name} calls {found}"

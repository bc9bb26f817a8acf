"""Imports among the modules of mfdist go to strictly lower layers, lazily imported ones included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mfdist"

# Modules of one layer do not import each other; where a concept has several files they take their places in
# order, separated by "/": a later place of the same layer may import an earlier one.
LAYERS = (
    "errors ids text_rows objective / storage / config metrics log schedule shuffle kernels",
    "shared / distributed launch dataset stopping lease",
    "card degrees reading prefetch sources spill optim shards dataset_report "
    "/ checkpoint / saver planted assembly layouts split lanes embedding export amend blocks / twin device_feed "
    "vocabulary prepare_config exchange "
    "json_rows table_rows / synthesize loader readers / ingest / counting / assemble baseline / survey / append "
    "/ compact / prepare",
    "model builtin",
    "floors ranking train_config run_directory housekeeping report fused / fused_gpu evaluate recommend validate "
    "/ baseline_run",
    "session api / finish / train / calibration / plan",
)


def places() -> dict[str, tuple[int, int]]:
    """Module -> (layer, place within it)."""
    return {
        name: (layer, place)
        for layer, line in enumerate(LAYERS)
        for place, names in enumerate(line.split("/"))
        for name in names.split()
    }


def modules() -> dict[str, list[Path]]:
    """The package's modules; a folder counts as one."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    found |= {path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}
    return found


def imported(source: str) -> set[str]:
    """Modules of mfdist that a source file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mfdist.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "mfdist" and node.level == 0:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mfdist."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError("relative imports hide their layer; write mfdist.<module>")
    return names - {"__version__"}


def test_every_module_has_a_place() -> None:
    assert sorted(set(modules()) - set(places())) == []


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name: str) -> None:
    order = places()
    for path in modules()[name]:
        for other in imported(path.read_text()) - {name}:
            assert order[other] < order[name], f"{path.relative_to(ROOT)} imports mfdist.{other}, which is not below it"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import mfdist.train", {"train"}),
        ("from mfdist import storage, train as t", {"storage", "train"}),
        ("from mfdist.kernels.reference import step", {"kernels"}),
        ("def f():\n    if x:\n        from mfdist import api", {"api"}),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    assert imported(source) == expected


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"polars", "pydantic", "surprise"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
import mfdist.train
"""


def test_training_needs_neither_polars_nor_pydantic_nor_surprise() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


COLLECTIVES = re.compile(
    r"\bdist\.(init_process_group|destroy_process_group|new_group|barrier|i?send|i?recv|(all_)?(reduce|gather|to_all)\w*|"
    r"scatter\w*|broadcast\w*)\("
)


def test_only_distributed_calls_process_groups() -> None:
    """Everything else goes through the World."""
    assert COLLECTIVES.search((PACKAGE / "distributed.py").read_text())
    for name, paths in modules().items():
        for path in paths:
            found = COLLECTIVES.search(path.read_text())
            assert name == "distributed" or not found, f"{path.relative_to(ROOT)} calls {found}"

#!/usr/bin/env python
"""Write jobs/README.md: the walk-through, and from the code each job's purpose, examples and flags.

python scripts/document_jobs.py     # after a change of a job's docstring or flags; a test holds the file to the code
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from mfdist import config
from mfdist.__main__ import JOBS

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Jobs

Made from the code and `jobs/walk_through.md` by `scripts/document_jobs.py`. `jobs/NAME.py` of a checkout, `mfdist NAME`
of an installation and `python -m mfdist.jobs.NAME` are the same program (`jobs/baseline_svd.py` is `mfdist baseline`).
Those that work on several ranks (train, evaluate, recommend, predict, similar) start under torchrun, or under `python
-m mfdist.launch` (`mfdist launch`), which takes torchrun's flags and passes on the exit codes below. Every job takes
`--config`, a TOML file that sets any of its flags; the command line wins. Every path may be a URL of fsspec. `--help`
shows the flags that are needed first (here in bold), `--help-all` every one.

| exit code | |
|---|---|
| 0 | done |
| 75 | stopped by request, what is finished is kept: run the same command again |
| 128 + a signal | stopped by that signal before there was anything to keep: run the same command again |
| 2 | bad usage or configuration |
| 3 | bad data |
| 4 | the loss became NaN or infinite |
| 5 | a required comparison was not met |
| 1 | anything else |
"""


class Seen(Exception):
    pass


def config_class(job: str) -> Any:
    """The dataclass that the job reads its flags into: what it hands to ``parse_config``."""
    module = importlib.import_module(f"mfdist.jobs.{job}")
    found = []

    def look(cls: Any, *_: Any) -> None:
        found.append(cls)
        raise Seen

    before, module.parse_config = module.parse_config, look  # type: ignore[attr-defined]
    try:
        module.main([])
    except Seen:
        return found[0]
    finally:
        module.parse_config = before  # type: ignore[attr-defined]
    raise AssertionError(f"{job} reads no flags")


def row(field: dataclasses.Field[Any], basic: bool) -> str:
    meta = field.metadata
    name = f"`--{field.name.replace('_', '-')}`"
    values = " or ".join(f"`{choice}`" for choice in meta["choices"])
    example = f", such as `{meta['example']}`" if meta["example"] else ""
    default = "" if isinstance(field.default, bool) else config.shown(field.default)
    return f"| {f'**{name}**' if basic else name} {values}".rstrip() + f" | {meta['help']}{example} | {default} |"


def tables(cls: Any) -> str:
    """The flags by their groups, as --help-all shows them; bold: those that --help shows, where it leaves some out."""
    fields = dataclasses.fields(cls)
    some = not all(config.is_basic(cls, field) for field in fields if not field.metadata["positional"])
    named = [f"| `{f.name.rstrip('s').upper()}` | {f.metadata['help']} | |" for f in fields if f.metadata["positional"]]
    parts = []
    for title, members in config.groups(cls).items():
        head = f"| {title if title != 'flags' else 'flag'} | meaning | default |\n|---|---|---|"
        parts.append("\n".join([head, *named, *(row(f, some and config.is_basic(cls, f)) for f in members)]))
        named = []
    return "\n\n".join(parts or ["\n".join(["| flag | meaning | default |", "|---|---|---|", *named])])


def section(job: str) -> str:
    text = inspect.getdoc(importlib.import_module(f"mfdist.jobs.{job}")) or ""
    words = "\n".join("    " + line.strip() if re.match(r"\s*(python|torchrun|mfdist) ", line) else line
                      for line in text.splitlines())  # fmt: skip
    return f"## {job}\n\n{words}\n\n{tables(config_class(job))}\n"


def document() -> str:
    return "\n".join([HEAD, (ROOT / "jobs/walk_through.md").read_text(), *(section(job) for job in JOBS)])


if __name__ == "__main__":
    (ROOT / "jobs/README.md").write_text(document())

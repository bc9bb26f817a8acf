"""The run directory: new, to be continued, finished, or somebody else's."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mfdist import json_tables, storage
from mfdist.config import to_toml
from mfdist.data.dataset import Dataset
from mfdist.errors import UsageError
from mfdist.run import checkpoint
from mfdist.run.about import REMEDY, read_about
from mfdist.run.lease import LEASE

RUNS, BUILTIN = "runs", "data/builtin"
OWN = ("config.toml", "run.json", "metrics.jsonl", "report.json", "report.html", "validation.json", "loss.png",
       "trackers.json", "tensorboard", "checkpoints", "model", "STOP")  # fmt: skip
"""What a run directory holds; --overwrite removes these names and nothing else."""


def numbered(restarted: bool) -> str:
    """A new folder runs/0001, runs/0002, ...; after a restart by torchrun the newest unfinished one, if any."""
    numbers = [int(name) for name in storage.list_names(RUNS) if name.isdigit()]
    newest = f"{RUNS}/{max(numbers):04d}" if numbers else None
    if restarted and newest and storage.exists(f"{newest}/run.json") and not storage.exists(f"{newest}/report.json"):
        return newest
    return f"{RUNS}/{max(numbers, default=0) + 1:04d}"


def prepare(
    run: str, config: Any, dataset: Dataset, *, job: str, resume: str, overwrite: bool
) -> dict[str, Any] | None:
    """Make ``run`` ready for ``job``; rank 0 calls. Returns the configuration of the run to be continued, None of a
    new one.

    UsageError where the folder holds another dataset's run, another job's, or (with ``resume`` never) any run at all.
    """
    names = [name for name in storage.list_names(run) if name not in ("STOP", LEASE)]
    shown = storage.redact(run)
    if names and overwrite:
        for name in OWN:
            storage.remove(storage.join(run, name))
        names = [name for name in names if name not in OWN]
    held = storage.join(run, "run.json")
    if not storage.exists(held):
        if any(name in OWN for name in names) or (names and not overwrite):
            raise UsageError(f"{shown} is not empty and holds no run of mfdist; choose another --run-dir.")
        _write(run, config, dataset, job)
        return None
    if resume == "never":
        raise UsageError(
            f"{shown} holds a run and --resume is never; give --overwrite to remove it, or another --run-dir."
        )
    before = read_about(run)
    if before.job != job:
        raise UsageError(f"{shown} holds a run of the job {json_tables.short(before.job)}; choose another --run-dir.")
    if before.dataset.fingerprint != dataset.manifest.fingerprint:
        name = json_tables.short(before.dataset.name)
        raise UsageError(
            f"{shown} is a run on the dataset {name} ({before.dataset.fingerprint[:12]}), "
            f"{storage.redact(dataset.path)} is {dataset.manifest.name} ({dataset.manifest.fingerprint[:12]}); "
            "choose another --run-dir, or --overwrite."
        )
    return before.config


def update(run: str, config: Any, dataset: Dataset, job: str) -> None:
    """Store the configuration of a continued run; rank 0 calls."""
    _write(run, config, dataset, job)


def finished_epochs(run: str) -> int | None:
    """Epochs of a finished run, None of an unfinished one."""
    path = storage.join(run, "report.json")
    return len(json_tables.field(path, "epochs", list[Any], REMEDY)) if storage.exists(path) else None


def newest_checkpoint_step(run: str) -> int | None:
    steps = checkpoint.committed_steps(run)
    return steps[-1] if steps else None


def _write(run: str, config: Any, dataset: Dataset, job: str) -> None:
    about = {  # the dataset's path as seen from here: config.toml's is lost where both were moved
        "job": job,
        "dataset": {"name": dataset.manifest.name, "fingerprint": dataset.manifest.fingerprint,
                    "path": storage.redact(storage.seen_from(dataset.path, run))},
        "config": {
            key: storage.redact(v) if isinstance(v, str) else v for key, v in dataclasses.asdict(config).items()
        },
    }  # fmt: skip
    storage.make_dirs(run)
    storage.write_text(storage.join(run, "config.toml"), to_toml(config))
    storage.write_text(storage.join(run, "run.json"), json.dumps(about, indent=1))

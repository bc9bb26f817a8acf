"""What a run was trained on, as its ``config.toml`` says."""

from __future__ import annotations

import os
import sys
from typing import Any

from mfdist import json_tables, storage
from mfdist.data.dataset import MANIFEST, Dataset
from mfdist.errors import DataError, UsageError
from mfdist.results.exported_model import ExportedModel
from mfdist.run.about import read_about

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def dataset_of_run(run: str) -> str:
    """The dataset directory that the run was trained on: where RUN/config.toml says, else as seen from the run (both
    were moved). UsageError where neither is a dataset that is there."""
    data = _run_config(run).get("data")
    if not isinstance(data, str):
        raise UsageError(f"{storage.redact(run)} does not say which dataset it was trained on; give --data DIR.")
    found = next((place for place in [data, *_moved_with(run)] if storage.exists(storage.join(place, MANIFEST))), None)
    if found is None:
        raise UsageError(f"{storage.redact(run)} was trained on {data}, which is not there now; give --data DIR.")
    return found


def _moved_with(run: str) -> list[str]:
    """The dataset as RUN/run.json sees it from the run directory, if it does."""
    try:
        path = read_about(run).dataset.path
    except (FileNotFoundError, NotADirectoryError):  # of the baseline
        return []
    if path is None or not (storage.is_local(path) and storage.is_local(run)):
        return []
    return [os.path.normpath(os.path.join(os.path.realpath(storage.local_path(run)), path))]


def dataset_of_model(model: ExportedModel, data: str | None) -> Dataset:
    """The dataset that a model was trained on, at ``data`` where it has moved; UsageError where that is another."""
    dataset = Dataset.open(data or dataset_of_run(model.run))
    check_dataset(model, dataset)
    return dataset


def sample_of_run(run: str) -> float:
    """The fraction of the users whose rows the run was made on; 1 unless RUN/config.toml says less."""
    try:
        return float(json_tables.typed(float, _run_config(run).get("sample-users", 1.0), "sample-users"))
    except ValueError as error:
        raise json_tables.damaged(storage.join(run, "config.toml"), error, "make the run again") from None


def check_dataset(model: ExportedModel, dataset: Dataset) -> None:
    """UsageError where the model's rows are not the dataset's."""
    if model.config["dataset"]["fingerprint"] != dataset.manifest.fingerprint:
        raise UsageError(f"{storage.redact(model.run)} was not trained on {storage.redact(dataset.path)}; its seen "
                         "items would be those of others. Give the dataset of the run with --data.")  # fmt: skip


def _run_config(run: str) -> dict[str, Any]:
    try:
        return tomllib.loads(storage.read_text(storage.join(run, "config.toml")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{storage.redact(run)}/config.toml is not valid TOML: {error}.") from None

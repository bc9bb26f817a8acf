"""What a run was trained on, as its ``config.toml`` says."""

from __future__ import annotations

import sys
from typing import Any

from mfdist import storage
from mfdist.data.dataset import Dataset
from mfdist.errors import DataError, UsageError
from mfdist.results.export import ExportedModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def dataset_of_run(run: str) -> str:
    """The dataset directory that RUN/config.toml names; UsageError where it names none that is there."""
    data = _run_config(run).get("data")
    if data is None:
        raise UsageError(f"{storage.redact(run)} does not say which dataset it was trained on; give --data DIR.")
    if not storage.exists(storage.join(data, "dataset.json")):
        raise UsageError(f"{storage.redact(run)} was trained on {data}, which is not there now; give --data DIR.")
    return str(data)


def dataset_of_model(model: ExportedModel, data: str | None) -> Dataset:
    """The dataset that a model was trained on, at ``data`` where it has moved; UsageError where that is another."""
    dataset = Dataset.open(data or dataset_of_run(model.run))
    check_dataset(model, dataset)
    return dataset


def sample_of_run(run: str) -> float:
    """The fraction of the users whose rows the run was made on; 1 unless RUN/config.toml says less."""
    return float(_run_config(run).get("sample-users", 1.0))


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
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{storage.redact(run)}/config.toml is not valid TOML: {error}.") from None

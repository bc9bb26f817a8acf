"""Runs that were not trained, for tests."""

from __future__ import annotations

from datasets import make_dataset
from test_export import export

from mfdist import storage


def small_dataset(tmp_path):
    return make_dataset(tmp_path / "data", rows=3000, lanes=5, val_rows=800, items=90)


def write_run(path, dataset, config=None, **kwargs):
    tables = export(path, dataset, config, **kwargs)
    storage.write_text(storage.join(str(path), "config.toml"), f'data = "{dataset.path}"\n')
    return tables

"""Raw files to a dataset directory, out of core: every row is read once, hashed, and accounted for.

    look      what each source is, which column is what, the first records as they are understood
    read      sources -> checked rows in buckets of the user hash; ids once each; refused rows to rejected.parquet
    count     only where needed: rows after merging, k-core, the time of a time split (passes over the buckets)
    write     bucket after bucket, in hash order: sort, merge, split, number the users, fill the lanes
    finish    users.parquet, items.parquet, the report, and the manifest last

Identity is the 64-bit hash of an id with exact comparison behind it; every order is a hash of ids and seed. So the
result depends neither on the order of the rows nor on files, chunks, threads or memory.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from mfdist import storage
from mfdist.data.dataset import MANIFEST, Dataset, verify
from mfdist.errors import DataError, UsageError
from mfdist.log import Console
from mfdist.prepare.columns import frame_layout, recognise
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.ids import HashCollision
from mfdist.prepare.input_files import find_sources, refuse_common
from mfdist.prepare.layout import Layout
from mfdist.prepare.preview import show
from mfdist.prepare.read_pass import Found, FrameSource, Ingest, ingest
from mfdist.prepare.row_checks import Rules
from mfdist.prepare.sources import Source
from mfdist.prepare.tables import check_id_types

MAX_SALTS = 4

__all__ = ["PrepareConfig", "look", "prepare", "prepare_frame"]


class Engine(Protocol):
    """What reads sources and makes a dataset of them. Whatever the engine, the dataset is the same, byte for byte.

    Both raise HashCollision where two different ids have one hash under ``salt``. ``scratch``: an empty local folder.
    """

    def sources(self, config: PrepareConfig, console: Console) -> list[Source]:
        """The files that ``config`` names, those of ``--val`` last."""

    def dataset(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
                request: dict[str, Any], scratch: str, console: Console) -> Dataset:  # fmt: skip
        """The dataset in ``config.target``; ``request`` goes into its manifest."""

    def read(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
             scratch: str, console: Console, time_unit: int) -> Ingest:  # fmt: skip
        """The rows of an append; ``time_unit``: ticks per second."""


class OneMachine:
    """The engine of one process, its threads and its disk."""

    def sources(self, config: PrepareConfig, console: Console) -> list[Source]:
        return named_sources(config, console)

    def dataset(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
                request: dict[str, Any], scratch: str, console: Console) -> Dataset:  # fmt: skip
        from mfdist.prepare.write_pass import assemble

        return assemble(config, self.read(config, sources, layouts, salt, scratch, console), request, scratch, console)

    def read(self, config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], salt: int,
             scratch: str, console: Console, time_unit: int = 1) -> Ingest:  # fmt: skip
        rules = rules_of(config, layouts, salt, console, time_unit)
        read = ingest(sources, layouts, rules, scratch, config.memory, console)
        check_read(config, read, sources)
        return read


def prepare(config: PrepareConfig, console: Console | None = None, engine: Engine | None = None) -> Dataset:
    """Do what ``config`` says; DataError and UsageError leave no dataset that was not there before.

    ``engine``: the one that ``config.engine`` names; left out, one machine.
    """
    console = console or Console()
    engine = engine or OneMachine()
    if config.verify:
        return _verified(config.target, console)
    if config.compact:
        from mfdist.prepare.compact import compact

        return compact(config.target, config.memory, console)
    assert not config.dry_run, "a dry run is look()"
    sources, layouts = look(config, console, engine)
    if config.append:
        return _appended(config, sources, layouts, engine, console)
    request = {"settings": _settings(config), "files": [[s.shown, s.bytes, s.val] for s in sources]}
    finished = _already(config, request, sources, console)
    return finished or _prepared(config, sources, layouts, request, engine, console)


def look(
    config: PrepareConfig, console: Console, engine: Engine | None = None
) -> tuple[list[Source | FrameSource], list[Layout]]:
    """The sources of ``config`` and what their columns are, shown with the first records; nothing is written.

    With ``--dry-run`` a DataError where no row of a source's beginning can be read.
    """
    sources = (engine or OneMachine()).sources(config, console)
    layouts = [recognise(source, config.columns) for source in sources]
    show(sources, layouts, config.rating_scale, console, strict=config.dry_run)
    if config.dry_run:
        console.info("--dry-run: nothing was written")
    return list(sources), layouts


def named_sources(config: PrepareConfig, console: Console) -> list[Source]:
    """The files of ``config``, those of ``--val`` last; UsageError where one is both."""
    files = find_sources(config.sources, say=console.info)
    vals = find_sources(config.val, val=True, say=console.info) if config.val else []
    refuse_common(files, vals)
    return [*files, *vals]


def prepare_frame(frame: Any, out: str, **settings: Any) -> Dataset:
    """A dataset from a polars or pandas data frame; ``settings`` are the fields of PrepareConfig (seed=1, order=...).

    An existing dataset in ``out`` is replaced.
    """
    for name in ("columns", "val"):
        if isinstance(settings.get(name), str):
            raise UsageError(f"prepare_frame: {name} is a sequence of texts.")
    if settings.get("engine", "local") != "local":
        raise UsageError("prepare_frame works on this machine: write the frame as Parquet for --engine spark.")
    config = PrepareConfig(sources=("data frame",), out=str(out), overwrite=True, **settings)
    table = frame.to_arrow() if hasattr(frame, "to_arrow") else _pandas_table(frame)
    layout = frame_layout(table, config.columns)
    check_id_types(table.schema, [str(name) for name in layout.columns[:2]], "the data frame")
    vals: list[Source | FrameSource] = [*find_sources(config.val, val=True)] if config.val else []
    layouts = [layout, *(recognise(s, config.columns) for s in vals if isinstance(s, Source))]
    return _prepared(config, [FrameSource(table), *vals], layouts, {}, OneMachine(), Console(False))


def _pandas_table(frame: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, AttributeError) as error:
        raise DataError(f"the data frame cannot be read: {error}.") from None


def _verified(path: str, console: Console) -> Dataset:
    from mfdist.prepare.replace import open_finished

    dataset = open_finished(path)
    with console.progress("verify", sum(entry.bytes for entry in dataset.manifest.files), unit="bytes") as progress:
        faults = list(verify(dataset, progress.advance))
    for fault in faults:
        console.info(fault)
    if faults:
        raise DataError(
            f"{storage.redact(path)}: {len(faults)} of {len(dataset.manifest.files)} files are not what the manifest "
            f"says; the first: {faults[0]}. Prepare it again."
        )
    console.info(f"{storage.redact(path)}: {len(dataset.manifest.files)} files are what the manifest says")
    return dataset


def _appended(config: PrepareConfig, sources: Sequence[Source | FrameSource], layouts: list[Layout], engine: Engine,
              console: Console) -> Dataset:  # fmt: skip
    from mfdist.prepare.append import append, check_append
    from mfdist.prepare.replace import open_finished

    dataset = open_finished(config.target)
    check_append(config, dataset.manifest)
    known = {source["fingerprint"]: source["path"] for source in dataset.manifest.sources}
    held = [known.get(fingerprint) for fingerprint in _fingerprints(sources, console)]
    if all(held):
        console.info(f"{storage.redact(config.target)} holds these files already")
        return dataset
    if any(held):
        both = next((source, path) for source, path in zip(sources, held, strict=True) if path)
        raise DataError(f"{storage.redact(config.target)} holds the rows of {both[0].shown} already (as {both[1]}); "
                        "append the other files alone.")  # fmt: skip
    if dataset.manifest.has_timestamp and not all(layout.has_time for layout in layouts):
        raise UsageError("the dataset has timestamps and a source has none: they cannot be appended.")
    if not dataset.manifest.has_timestamp:
        layouts = [layout.without_time() for layout in layouts]
    if dataset.manifest.extra["explicit_scale"]:
        config = replace(config, rating_scale=config.rating_scale or dataset.manifest.rating_scale)
    scratch = scratch_folder(config.target)
    try:
        extra = dataset.manifest.extra
        read = engine.read(config, sources, layouts, int(extra["salt"]), scratch, console, int(extra["time_unit"]))
        return append(config, dataset, read, scratch, console)
    except HashCollision:
        raise DataError("two new ids have one hash under the dataset's; prepare all files together.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _settings(config: PrepareConfig) -> dict[str, Any]:
    left_out = ("sources", "out", "val", "memory", "overwrite", "append", "compact", "verify", "dry_run", "engine",
                "spark_master", "source_format")  # fmt: skip
    plain = {k: v for k, v in asdict(config).items() if k not in left_out}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _already(
    config: PrepareConfig, request: dict[str, Any], sources: Sequence[Source | FrameSource], console: Console
) -> Dataset | None:
    """The dataset in ``--out`` where it is the one asked for; UsageError where it is another."""
    if not storage.exists(storage.join(config.target, MANIFEST)):
        return None
    if config.overwrite:
        return None
    dataset = Dataset.open(config.target)
    prints = [source["fingerprint"] for source in dataset.manifest.sources]
    if dataset.manifest.extra.get("request") != request or prints != _fingerprints(sources, console):
        raise _other_dataset(config.target)
    dataset.check_files()
    console.info(f"{storage.redact(config.target)} is prepared already, from these files with these settings")
    return dataset


def refuse_other_settings(config: PrepareConfig) -> None:
    """UsageError where ``--out`` holds a dataset that was asked for with other settings, whatever its files."""
    if config.overwrite or not storage.exists(storage.join(config.target, MANIFEST)):
        return
    request = Dataset.open(config.target).manifest.extra.get("request") or {}
    if request.get("settings") != _settings(config):
        raise _other_dataset(config.target)


def _other_dataset(out: str) -> UsageError:
    return UsageError(
        f"{storage.redact(out)} holds a dataset of other files or settings; choose another --out, or replace it with "
        "--overwrite."
    )


def _fingerprints(sources: Sequence[Source | FrameSource], console: Console) -> list[str]:
    from mfdist.prepare.sources import file_fingerprint

    with console.busy("comparing the files with those of the dataset"):
        return [file_fingerprint(source) for source in sources if isinstance(source, Source)]


TABLES = ".tables"
"""Copies of what only Spark can read, while a dataset is made of them (``prepare_spark.lake_tables``)."""
OWN_NAMES = {MANIFEST, "train", "val", "report", "users.parquet", "items.parquet", "rejected.parquet", ".scratch",
             TABLES}  # fmt: skip
_OWN_FILE = re.compile(r"lane-\d+.*\.parquet|(ratings|ratings_per_user|ratings_per_item|activity)\.png.*|index\.html.*")


def check_target(out: str) -> None:
    """UsageError where making a dataset in ``out`` would remove files that no dataset has."""
    names = [name for name in storage.list_names(out) if not re.fullmatch(r".*\.(next|\d+\.tmp)", name)]
    foreign = [name for name in names if name not in OWN_NAMES]
    for folder in ("train", "val", "report"):
        inside = storage.list_names(storage.join(out, folder)) if folder in names else []
        foreign += [f"{folder}/{name}" for name in inside if not _OWN_FILE.fullmatch(name)]
    if foreign:
        raise UsageError(
            f"{storage.redact(out)} is no dataset and holds other files ({', '.join(foreign[:3])}); choose an --out "
            "that is empty or does not exist."
        )


def scratch_folder(out: str) -> str:
    """A fresh local folder for what does not fit in memory; one left by a killed job is removed."""
    if not storage.is_local(out):
        return tempfile.mkdtemp(prefix="mfdist-prepare-")
    folder = os.path.join(os.path.abspath(storage.local_path(out)), ".scratch")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    return folder


def _prepared(
    config: PrepareConfig,
    sources: Sequence[Source | FrameSource],
    layouts: list[Layout],
    request: dict[str, Any],
    engine: Engine,
    console: Console,
) -> Dataset:
    check_target(config.target)
    made = storage.is_local(config.target) and not os.path.exists(storage.local_path(config.target))
    scratch = scratch_folder(config.target)
    try:
        for salt in range(MAX_SALTS):
            try:
                return engine.dataset(config, sources, layouts, salt, request, scratch, console)
            except HashCollision:
                console.warn("two different ids have one hash; beginning again with another hash")
                shutil.rmtree(scratch)
                os.makedirs(scratch)
        raise DataError("ids collide under every hash; this cannot happen by chance, so please report it.")
    except BaseException:
        if made and not os.path.exists(os.path.join(storage.local_path(config.target), MANIFEST)):
            shutil.rmtree(storage.local_path(config.target), ignore_errors=True)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rules_of(
    config: PrepareConfig, layouts: Sequence[Layout], salt: int, console: Console, time_unit: int = 1
) -> Rules:
    """How the rows of all sources are judged. ``time_unit``: ticks per second."""
    with_time = all(layout.has_time for layout in layouts)
    if not with_time and any(layout.has_time for layout in layouts):
        console.info("not every source has timestamps: they are left out")
    if not config.append and not with_time and config.split in ("last-n", "time") and not config.val:
        raise UsageError(f"--split {config.split} needs timestamps, and the sources have none.")
    return Rules(salt, config.rating_scale, with_time, time_unit)


def check_read(config: PrepareConfig, found: Found, sources: Sequence[Source | FrameSource]) -> None:
    """DataError where too many rows are refused or none is left."""
    refused = found.num_rejected
    if refused > config.max_rejected * found.num_in:
        examples = "; ".join(map(str, found.examples[:3]))
        raise DataError(
            f"{refused:,} of {found.num_in:,} rows are refused, more than --max-rejected {config.max_rejected:g} "
            f"allows: {examples}. Mend the source, set --columns, or raise --max-rejected."
        )
    if found.num_rows == 0:
        raise DataError(f"{sources[0].shown} holds no rows of ratings.")

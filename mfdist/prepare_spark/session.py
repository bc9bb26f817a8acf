"""A Spark session: what it needs, how it is set, and its failures as sentences."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from mfdist import storage
from mfdist.errors import MfdistError, UsageError
from mfdist.prepare_spark.messages import FACT, FAULT, Message, value_of

LEAST_JAVA = 17
LATE_SECONDS = 5.0
"""How late a file may be seen on another machine by a network's disk."""
SETTINGS = {
    "spark.sql.adaptive.enabled": "false",  # it would put several lanes into one task
    "spark.sql.execution.arrow.maxRecordsPerBatch": "16",  # messages have megabytes
    "spark.driver.maxResultSize": "0",  # the driver gets the hashes of all items
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
}


def check_installed() -> None:
    """UsageError where PySpark, or the Java that it needs, is missing."""
    try:
        import pandas  # noqa: F401 (mapInArrow looks for it)
        import pyspark.sql  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'--engine spark needs PySpark with pandas, and {error.name} is not installed: pip install "mfdist[spark]".'
        ) from None
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    remedy = f"install Java {LEAST_JAVA} (such as openjdk-17-jre-headless), or set JAVA_HOME to where it is"
    if not java or not os.access(java, os.X_OK):
        where = f"JAVA_HOME is {home}, which has no bin/java" if home else "there is no java on the PATH"
        raise UsageError(f"--engine spark needs Java, and {where}: {remedy}.")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if not version or int(version[1]) < LEAST_JAVA:
        found = f"is Java {version[1]}" if version else "does not say its version"
        raise UsageError(f"--engine spark needs Java {LEAST_JAVA} or later, and {java} {found}: {remedy}.")


@contextmanager
def session(master: str | None) -> Iterator[Any]:
    """A SparkSession; one of our own is stopped at the end. One that this process has already is used, with SETTINGS
    for as long as the block lasts and none of the rows kept on its disks afterwards; it goes on listing the small files
    that were shared with tasks.

    A failure of Spark's in the block becomes a MfdistError.
    """
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # A session is active in the thread that made it; the context behind it is the process's.
    before = SparkSession.getActiveSession()
    if before is None and SparkContext._active_spark_context:
        before = SparkSession.builder.getOrCreate()
    old = {name: before.conf.get(name, None) for name in SETTINGS if before.conf.isModifiable(name)} if before else {}
    builder = SparkSession.builder.appName("mfdist prepare")
    if master:
        builder = builder.master(master)
    for name, value in SETTINGS.items():
        builder = builder.config(name, value)
    if "PYTHONPATH" in os.environ:
        builder = builder.config("spark.executorEnv.PYTHONPATH", os.environ["PYTHONPATH"])
    with explained(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")  # nothing here is of pandas
        spark = builder.getOrCreate()
        try:
            yield spark
        finally:
            if before is None:
                spark.stop()
            else:
                put_back(before, old)


def put_back(spark: Any, settings: dict[str, str | None]) -> None:
    """Set a session's settings; None: as if it had never been set."""
    for name, value in settings.items():
        if value is None:
            spark.conf.unset(name)
        else:
            spark.conf.set(name, value)


@contextmanager
def explained() -> Iterator[None]:
    """A failure of Spark's in the block becomes a MfdistError."""
    from py4j.protocol import Py4JError, Py4JNetworkError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError, Py4JNetworkError) as error:
        raise MfdistError(f"Spark gave up: {reason_of(str(error))}. Its log says more.") from error


def check_shared(spark: Any, folder: str | None, out: str, sources: Iterable[str] = ()) -> None:
    """UsageError where an executor does not see what the driver writes into ``folder`` (of ``out``), or a source.

    Before the work: as many tasks look as there are cores, which reaches most executors, if not all."""
    marker = storage.join(folder, f"seen-{secrets.token_hex(8)}") if folder and storage.is_local(folder) else None
    looked_for = [path for path in map(storage.absolute, sources) if storage.is_local(path)]
    if marker and folder:
        storage.make_dirs(folder)
        storage.write_text(marker, "")
        looked_for.insert(0, marker)
    if not looked_for:
        return
    tasks = max(1, spark.sparkContext.defaultParallelism)
    try:
        found = spark.range(0, tasks, 1, tasks).mapInArrow(missing_task(looked_for), "path string").collect()
    finally:
        if marker:
            storage.remove(marker)
    missing = {row[0] for row in found}
    if marker in missing:
        raise _unshared(out)
    if missing:
        raise UsageError(
            f"{storage.redact(min(missing))} is not to be seen on all executors: sources must be on a disk that all of "
            "them share, or URLs."
        )


def missing_task(paths: Sequence[str]) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Which of ``paths`` this executor does not see, looking again for as long as a network's disk may be late."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        missing, patience = list(paths), time.monotonic() + LATE_SECONDS
        while missing := [path for path in missing if not os.path.exists(path)]:
            if time.monotonic() > patience:
                break
            time.sleep(0.2)
        yield pa.RecordBatch.from_pydict({"path": pa.array(missing, pa.string())})

    return run


def check_seen(paths: Iterable[str], out: str) -> None:
    """UsageError where the driver does not see the files that the executors have written."""
    if not all(map(storage.exists, paths)):
        raise _unshared(out)


def _unshared(out: str) -> UsageError:
    return UsageError(
        f"{storage.redact(out)} is another folder on the executors than on the driver: --out must be on a disk that "
        "all of them share, or a URL."
    )


def reason_of(text: str) -> str:
    """The last error of a Python task that Spark's text quotes, else the first line that says something."""
    raised = re.findall(r"^\s*(?:\w+\.)*\w*(?:Error|Exception|Interrupt): .*$", text, re.M)
    python = [line for line in raised if not line.lstrip().startswith(("org.", "java.", "py4j.", "pyspark."))]
    lines = [line for line in text.splitlines() if line.strip()]
    chosen = (python or [line for line in lines if "Exception" in line or "Error" in line] or lines or ["no reason"])[0]
    return " ".join(chosen.split())[:500].rstrip(".")


def kept(frame: Any) -> Any:
    """The DataFrame, kept on the executors' disks once it has been computed; what is lost is computed again."""
    from pyspark import StorageLevel

    return frame.persist(StorageLevel.DISK_ONLY)


def attempt() -> int:
    """A number that no other attempt of any task of this session has; called in a task."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    return int(context.taskAttemptId())


def collected(frame: Any) -> list[Message]:
    """All messages of a DataFrame, on the driver."""
    return [Message(row[0], row[1], row[2], row[3], bytes(row[4])) for row in frame.collect()]


def streamed(frame: Any) -> Iterator[Message]:
    """The messages of a DataFrame, partition after partition, one of them on the driver at a time."""
    for row in frame.toLocalIterator(prefetchPartitions=True):
        yield Message(row[0], row[1], row[2], row[3], bytes(row[4]))


def facts_in(messages: list[Message]) -> list[Any]:
    """The facts among messages, in the order of their places; raises the first fault."""
    for message in sorted((m for m in messages if m.kind == FAULT), key=lambda m: m.place):
        raise value_of(message)
    return [value_of(m) for m in sorted((m for m in messages if m.kind == FACT), key=lambda m: m.place)]

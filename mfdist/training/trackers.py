"""Trackers: the scalars of ``metrics.jsonl`` for TensorBoard, MLflow and Weights & Biases, while a run trains.

A tracker is fed with the records themselves, by a thread of its own: a step never waits for one, and one that fails
says so once and is left. Tags are those of :data:`TAGS`, in the groups ``error/``, ``speed/`` and ``system/``.

After a kill a run goes on from its last checkpoint. TensorBoard's files are then written anew from the records that
are kept; MLflow and Weights & Biases keep what they have, and get what lies behind it: no gap, no step twice. Which of
their runs is this one is written in ``RUN/trackers.json``.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mfdist import storage
from mfdist.errors import UsageError
from mfdist.log import Record

REMOTE = ("mlflow", "wandb")
"""Values of --track; each is the name of its library and of an extra of the package."""
PATIENCE_SECONDS = 60.0
"""How long the end of a run waits for a tracker that has not taken everything."""
Scalar = tuple[str, float]
GIB = 2.0**30


def _share(record: Record, key: str) -> float | None:
    return record[key] / record["seconds"] if record["seconds"] else None


TAGS: dict[str, dict[str, Callable[[Record], float | None]]] = {
    "interval": {
        "error/train_rmse": lambda r: r["train_rmse"],
        "speed/ratings_per_second": lambda r: r["ratings_per_second"],
        "speed/share_waiting_for_data": lambda r: _share(r, "wait_seconds"),
        "speed/share_waiting_for_ranks": lambda r: _share(r, "ranks_wait_seconds"),
        "system/learning_rate": lambda r: r["learning_rate"],
        "system/memory_gib": lambda r: r["memory_bytes"] / GIB,
    },
    "epoch": {
        "error/train_rmse_of_epoch": lambda r: r["train_rmse"],
        "error/val_rmse": lambda r: r["val_rmse"],
        "error/val_mae": lambda r: r["val_mae"],
        "error/val_rmse_clipped": lambda r: r["val_rmse_clipped"],
        "error/val_mae_clipped": lambda r: r["val_mae_clipped"],
        "error/stop_rmse": lambda r: r["stop_rmse"],
        "ranking/ndcg_at_10": lambda r: r.get("ndcg@10"),
        "speed/epoch_seconds": lambda r: r["seconds"],
        "speed/validation_seconds": lambda r: r["validation_seconds"],
    },
    "checkpoint": {
        "system/checkpoint_pause_seconds": lambda r: r["pause_seconds"],
        "system/checkpoint_gib": lambda r: r["bytes"] / GIB,
    },
    "compile": {"system/compile_seconds": lambda r: r["seconds"]},
    "result": {
        "error/result_rmse_clipped": lambda r: r["val_rmse_clipped"],
        "error/result_mae_clipped": lambda r: r["val_mae_clipped"],
        "error/floor_global_mean": lambda r: r["floors"].get("global_mean"),
        "error/floor_item_mean": lambda r: r["floors"].get("item_mean"),
        "error/floor_bias": lambda r: r["floors"].get("bias"),
    },
}
"""Kind of record -> tag -> its value; None is not written."""


def scalars(record: Record) -> Iterator[Scalar]:
    """(tag, value) of a record."""
    for tag, value_of in TAGS.get(record["kind"], {}).items():
        value = value_of(record)
        if value is not None and math.isfinite(value):
            yield tag, float(value)


class Sink(Protocol):
    """Where scalars go; its methods are called by one thread, ``open`` first."""

    name: str

    def open(self) -> None: ...

    def take(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The sinks of a run, each with its thread; ``warn`` is told once of one that fails."""

    def __init__(self, sinks: list[Sink], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._feeds: list[tuple[Sink, queue.SimpleQueue[Record | None], threading.Thread]] = []
        for sink in sinks:
            records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
            thread = threading.Thread(target=self._feed, args=(sink, records), name=sink.name, daemon=True)
            self._feeds.append((sink, records, thread))
            thread.start()

    def record(self, record: Record) -> None:
        """Pass a record on; returns at once."""
        if record["kind"] in TAGS:
            for _, records, _ in self._feeds:
                records.put(record)

    def close(self) -> None:
        """Wait until everything is written, for as long as that is reasonable."""
        for _, records, _ in self._feeds:
            records.put(None)
        for sink, _, thread in self._feeds:
            thread.join(PATIENCE_SECONDS)
            if thread.is_alive():
                self._warn(f"{sink.name} has not taken all figures after {PATIENCE_SECONDS:.0f} s and is left")
        self._feeds = []

    def _feed(self, sink: Sink, records: queue.SimpleQueue[Record | None]) -> None:
        try:
            sink.open()
            while (record := records.get()) is not None:
                sink.take(record)
                if records.empty():
                    sink.flush()
            sink.close()
        except Exception as error:  # a server, a disk, a library: the run goes on
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._warn(f"{sink.name} failed and gets no more figures ({storage.redact(said)}); the run goes on")


def check_track(track: str | None) -> None:
    """UsageError where the library of --track is not installed."""
    if track is not None and importlib.util.find_spec(track) is None:
        raise UsageError(f"--track {track} needs the library {track}: pip install 'mfdist[{track}]'.")


def open_trackers(run: str, track: str | None, config: Mapping[str, Any], warn: Callable[[str], None]) -> Trackers:
    """TensorBoard's where the run directory is local, and the one of --track; one rank calls.

    ``config``: every key of the configuration, the hyper-parameters.
    """
    shown = {key.replace("_", "-"): "not set" if value is None else value for key, value in config.items()}
    sinks: list[Sink] = []
    if storage.is_local(run):
        sinks.append(TensorBoard(run, shown))
    known = _known_runs(run)
    if track == "mlflow":
        sinks.append(MLflow(run, shown, known.get("mlflow")))
    if track == "wandb":
        sinks.append(WeightsAndBiases(run, shown, known.get("wandb")))
    return Trackers(sinks, warn)


def _known_runs(run: str) -> dict[str, str]:
    path = storage.join(run, "trackers.json")
    return dict(json.loads(storage.read_text(path))) if storage.exists(path) else {}


def _remember(run: str, name: str, which: str) -> None:
    known = {**_known_runs(run), name: which}
    storage.write_text(storage.join(run, "trackers.json"), json.dumps(known) + "\n")


def _name_of(run: str) -> str:
    return storage.name_of(run.rstrip("/"))


# Where they go ------------------------------------------------------------------------------------


class TensorBoard:
    """``RUN/tensorboard``, written anew whenever a run begins or goes on."""

    name = "TensorBoard"

    def __init__(self, run: str, config: Mapping[str, Any]) -> None:
        self._folder, self._config = storage.join(storage.local_path(run), "tensorboard"), config
        self._events: Any = None
        self._summaries: Any = None

    def open(self) -> None:
        self._summaries = importlib.import_module("torch.utils.tensorboard.summary")
        storage.remove(self._folder)
        self._events = _EventFile(self._folder)
        lines = ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in self._config.items())]
        self._events.add(self._summaries.text("configuration", "\n".join(lines)), 0, time.time())

    def take(self, record: Record) -> None:
        for tag, value in scalars(record):
            summary = self._summaries.scalar(tag, value)
            if tag.startswith("error/floor"):  # a level line
                self._events.add(summary, 0, record["time"])
            self._events.add(summary, record["step"], record["time"])
        if record["kind"] == "result":
            for summary in self._summaries.hparams(self._plain_config(), dict(scalars(record))):
                self._events.add(summary, 0, record["time"])

    def _plain_config(self) -> dict[str, Any]:
        return {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                for key, value in self._config.items()}  # fmt: skip

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.flush()


class _EventFile:
    """A file of TensorBoard's events, written by the thread that calls, and open only while it is written.

    The library's own ``SummaryWriter`` writes from a thread of its own, which ends with a traceback on a full disk.
    """

    def __init__(self, folder: str) -> None:
        record_writer = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._waiting = os.path.join(folder, name), io.BytesIO()
        self._records = record_writer.RecordWriter(self._waiting)
        self._write(wall_time=time.time(), file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(wall_time=time.time(), step=0, session_log=start)  # a viewer forgets what it has read

    def add(self, summary: Any, step: int, wall_time: float) -> None:
        """``wall_time``: seconds since 1970. In the file after :meth:`flush`."""
        self._write(wall_time=wall_time, step=step, summary=summary)

    def _write(self, **fields: Any) -> None:
        self._records.write(self._proto.Event(**fields).SerializeToString())

    def flush(self) -> None:
        with open(self._path, "ab") as stream:
            stream.write(self._waiting.getvalue())
        self._waiting.seek(0)
        self._waiting.truncate()


class MLflow:
    """A run of the server that ``MLFLOW_TRACKING_URI`` names; its experiment: ``MLFLOW_EXPERIMENT_NAME`` or mfdist."""

    name = "MLflow"

    def __init__(self, run: str, config: Mapping[str, Any], known: str | None) -> None:
        self._run, self._config, self._id = run, config, known
        self._client: Any = None
        self._waiting: list[Any] = []
        self._last: dict[str, int] = {}  # the newest step of each tag that the server has

    def open(self) -> None:
        tracking, entities = importlib.import_module("mlflow.tracking"), importlib.import_module("mlflow.entities")
        self._metric = entities.Metric
        self._client = tracking.MlflowClient()
        if self._id is not None:
            found = self._client.get_run(self._id)
            for tag in found.data.metrics:
                self._last[tag] = max(metric.step for metric in self._client.get_metric_history(self._id, tag))
            self._client.set_terminated(self._id, "RUNNING")
            return
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mfdist")
        experiment = self._client.get_experiment_by_name(wanted)
        number = experiment.experiment_id if experiment else self._client.create_experiment(wanted)
        self._id = self._client.create_run(number, run_name=_name_of(self._run)).info.run_id
        settings = [entities.Param(key, str(value)[:500]) for key, value in self._config.items()]
        for first in range(0, len(settings), 100):
            self._client.log_batch(self._id, params=settings[first : first + 100])
        _remember(self._run, "mlflow", str(self._id))

    def take(self, record: Record) -> None:
        for tag, value in scalars(record):
            if record["step"] > self._last.get(tag, -1):
                self._last[tag] = record["step"]
                self._waiting.append(self._metric(tag, value, int(1000 * record["time"]), record["step"]))
        if len(self._waiting) > 500:
            self.flush()

    def flush(self) -> None:
        for first in range(0, len(self._waiting), 1000):
            self._client.log_batch(self._id, metrics=self._waiting[first : first + 1000])
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._id)


class WeightsAndBiases:
    """A run of Weights & Biases, as ``WANDB_*`` say where, in the project ``WANDB_PROJECT`` or mfdist."""

    name = "Weights & Biases"

    def __init__(self, run: str, config: Mapping[str, Any], known: str | None) -> None:
        self._run, self._config, self._known = run, config, known
        self._to: Any = None
        self._last = -1

    def open(self) -> None:
        library = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", "mfdist")
        again = {"id": self._known, "resume": "must"} if self._known else {}
        self._to = library.init(project=project, name=_name_of(self._run), config=dict(self._config), **again)
        if self._known:
            self._last = int(self._to.step) - 1
        else:
            _remember(self._run, "wandb", str(self._to.id))

    def take(self, record: Record) -> None:
        found = dict(scalars(record))
        if found and record["step"] > self._last:
            self._to.log(found, step=record["step"])

    def flush(self) -> None:
        """Its library sends by itself."""

    def close(self) -> None:
        self._to.finish()

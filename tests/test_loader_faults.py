"""The loader on foreign and damaged data, on a slow and failing object store, and when its consumer goes away."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import numpy as np
import psutil
import pyarrow as pa
import pytest
from datasets import make_dataset, sorted_rows, training_rows, write_dataset
from fsspec.implementations.memory import MemoryFileSystem

from mfdist.data import loader as loader_module
from mfdist.data import row_groups
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.data.prefetch import Prefetcher
from mfdist.data.scan import scan
from mfdist.errors import DataError

RANGES = [(0, 100)]


def one_lane(path: Path, columns: dict[str, Any], **options: Any) -> Dataset:
    base = {"user": np.arange(90) % 100, "item": np.arange(90) % 20, "rating": np.ones(90, np.float32)}
    return write_dataset(path, [[{**base, **columns}]], ranges=RANGES, num_items=20, row_group=40, **options)


def epoch_rows(dataset: Dataset, **options: Any) -> np.ndarray:
    with Loader(dataset, **{"batch_size": 16, "seed": 1, "rank": 0, "world_size": 1, **options}) as loader:
        parts = [np.stack([b.user.numpy(), b.item.numpy(), b.rating.numpy()], 1) for b in loader.epoch(0)]
    return np.concatenate(parts).astype(np.float64)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mfdist-prefetch")]


@pytest.mark.parametrize("rating", [np.float64, np.int8, np.float32])
@pytest.mark.parametrize("ids", [np.int64, np.int32, np.int16])
def test_other_types_are_converted(tmp_path: Path, ids: Any, rating: Any) -> None:
    columns = {"user": (np.arange(90) % 100).astype(ids), "rating": (np.arange(90) % 5).astype(rating)}
    dataset = one_lane(tmp_path, columns)
    with Loader(dataset, batch_size=50, seed=0, rank=0, world_size=1) as loader:
        batch = next(iter(loader.epoch(0)))
    assert [str(t.dtype) for t in (batch.user, batch.item, batch.rating)] == ["torch.int32"] * 2 + ["torch.float32"]
    assert np.array_equal(sorted_rows(*epoch_rows(dataset).T), training_rows(dataset))


BAD_COLUMNS = {
    "nulls": ({"item": pa.array([None, *([1] * 89)], pa.int32())}, r"row group 0: .*nulls in column 'item'"),
    "user range": ({"user": np.arange(90) + 20}, r"row group 2: has user rows \d+ to 109 outside \[0, 100\)"),
    "item range": ({"item": np.arange(90) - 1}, r"row group 0: has item rows -1"),
    "nan": ({"rating": np.where(np.arange(90) == 50, np.nan, 1).astype(np.float32)}, "row group 0.*not a finite"),
    "text": ({"user": [str(n) for n in range(90)]}, "column 'user' is of type string"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_values_are_refused_by_name(tmp_path: Path, case: str) -> None:
    columns, words = BAD_COLUMNS[case]
    dataset = foreign_lane(tmp_path, columns)
    with pytest.raises(DataError, match=f"lane-00000.parquet.*{words}"):
        epoch_rows(dataset)
    assert prefetch_threads() == []


def foreign_lane(path: Path, columns: dict[str, Any]) -> Dataset:
    """A dataset whose one file was written by somebody else: its manifest agrees, its values may not."""
    base = {"user": np.arange(90) % 100, "item": np.arange(90) % 20, "rating": np.ones(90, np.float32)}
    plain = {name: np.zeros(90, np.int64) if name != "rating" else np.ones(90) for name in base}
    dataset = write_dataset(path, [[plain]], ranges=RANGES, num_items=20)
    entry = datasets._write_file(str(path), "train", 0, 0, {**base, **columns}, 40, "lz4")
    text = (path / "dataset.json").read_text()
    old = dataset.manifest.files[0]
    text = text.replace(f'"bytes": {old.bytes}', f'"bytes": {entry.bytes}').replace(old.checksum, entry.checksum)
    (path / "dataset.json").write_text(text)
    return Dataset.open(str(path))


def test_files_that_are_not_as_the_manifest_says_are_refused_before_training(tmp_path: Path) -> None:
    def damage(name: str, act: Any, words: str) -> None:
        folder = tmp_path / name
        dataset = make_dataset(folder, 500, 2)
        act(folder / "train" / "lane-00001.parquet")
        with pytest.raises(DataError, match=f"lane-00001.parquet {words}"):
            Loader(dataset, batch_size=8, seed=0, rank=1, world_size=2)
        Loader(dataset, batch_size=8, seed=0, rank=0, world_size=2)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[200] ^= 255
        path.write_bytes(content)

    damage("missing", Path.unlink, "is missing")
    damage("short", lambda path: path.write_bytes(path.read_bytes()[:-50]), "has .* bytes, the manifest says")
    damage("footer", lambda path: path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8), "has another checksum")
    damage("changed", flip, "has another checksum")


def test_without_checksums_a_damaged_footer_is_still_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "CHECKSUM_BYTES", 0)
    dataset = make_dataset(tmp_path, 500, 1)
    path = tmp_path / "train" / "lane-00000.parquet"
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(DataError, match=r"lane-00000.parquet has no readable Parquet footer"):
        Loader(dataset, batch_size=8, seed=0, rank=0, world_size=1)


def test_row_groups_too_large_for_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path, 5000, 2, row_group=2500)
    monkeypatch.setattr(loader_module, "available_bytes", lambda: 100_000)
    with pytest.raises(DataError, match=r"row group 0 has 2,500 rows; two such groups"):
        Loader(dataset, batch_size=8, seed=0, rank=0, world_size=1)


def test_tiny_row_groups_are_read_together(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 3000, 1, row_group=5)
    with Loader(dataset, batch_size=64, seed=0, rank=0, world_size=1) as loader:
        assert len(loader._pieces[0]) == 1
        assert sum(len(batch.user) for batch in loader.epoch(0)) == 3000


def test_an_early_stop_and_an_error_leave_no_thread_and_no_file(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 20_000, 8, row_group=500)
    with Loader(dataset, batch_size=16, seed=0, rank=0, world_size=1, threads=4) as loader:
        list(loader.epoch(0))
        files = len(psutil.Process().open_files())
        for batch in loader.epoch(0):
            if batch.step == 3:
                break
        del batch
        gc.collect()
        with pytest.raises(ZeroDivisionError):
            for batch in loader.epoch(1):
                1 // (batch.step - 2)
    gc.collect()
    assert prefetch_threads() == [] and len(psutil.Process().open_files()) == files


def test_the_interpreter_ends_while_an_epoch_is_open(tmp_path: Path) -> None:
    make_dataset(tmp_path, 20_000, 4, row_group=500)
    program = (
        "from mfdist.data.dataset import Dataset; from mfdist.data.loader import Loader\n"
        f"loader = Loader(Dataset.open({str(tmp_path)!r}), batch_size=16, seed=0, rank=0, world_size=1, threads=3)\n"
        "epoch = loader.epoch(0); print(next(epoch).step)\n"
        "import sys; sys.exit(7)"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=240, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "0\n", "")


def test_a_failure_comes_after_the_blocks_before_it() -> None:
    def blocks() -> Any:
        for number in range(20):

            def part(number: int = number) -> None:
                time.sleep(0.002 * (number % 3))
                if number == 11:
                    raise ValueError("eleven")

            yield [part], lambda number=number: number

    prefetcher = Prefetcher(blocks(), threads=4, ahead=6)
    got = []
    with pytest.raises(ValueError, match="eleven"):
        for number in prefetcher:
            got.append(number)
    prefetcher.close()
    assert got == list(range(11)) and prefetch_threads() == []


def test_work_in_flight_is_bounded() -> None:
    started: list[int] = []
    blocks = (([lambda number=number: started.append(number)], lambda: None) for number in range(50))
    prefetcher = Prefetcher(iter(blocks), threads=3, ahead=4)
    next(prefetcher)
    end = time.monotonic() + 30
    while len(started) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(started) == 5
    prefetcher.close()


def test_memory_is_flat_over_epochs(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 1_500_000, 16, row_group=32_768)
    peaks = []
    with Loader(dataset, batch_size=8192, seed=0, rank=0, world_size=1, threads=2, memory_bytes=0) as loader:
        for epoch in range(5):
            peak = 0
            for batch in loader.epoch(epoch):
                if batch.step % 20 == 0:
                    peak = max(peak, psutil.Process().memory_info().rss)
            peaks.append(peak)
    assert max(peaks[2:]) <= 1.05 * peaks[1]


class FailingFileSystem(MemoryFileSystem):
    """memory:// under another name, where every third read fails once."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[Any] = itertools.count(1)
    error: ClassVar[type[Exception]] = ConnectionResetError

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("failing://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if next(self.calls) % 3 == 0:
            raise self.error("connection reset by the test")
        content: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return content


def test_transient_errors_are_tried_again(tmp_path: Path) -> None:
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    local = make_dataset(tmp_path, 3000, 3, row_group=200)
    store = fsspec.filesystem("failing")
    FailingFileSystem.calls = itertools.repeat(1)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            store.pipe_file(f"/data/{file.relative_to(tmp_path)}", file.read_bytes())
    remote = Dataset.open("failing://data")
    FailingFileSystem.calls = itertools.count(1)
    with Loader(remote, batch_size=16, seed=1, rank=0, world_size=1, memory_bytes=0) as loader:
        got = np.concatenate([batch.user.numpy() for batch in loader.epoch(0)])
        assert loader.stats.retries > 0
    assert np.array_equal(got, epoch_rows(local, memory_bytes=0)[:, 0])
    FailingFileSystem.calls, FailingFileSystem.error = itertools.repeat(3), PermissionError
    with pytest.raises(DataError, match="lane-0000"):
        Loader(remote, batch_size=16, seed=1, rank=0, world_size=1)
    FailingFileSystem.error = ConnectionResetError


@pytest.fixture
def slow_failing_s3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An S3 server over HTTP behind a proxy that waits 5 ms a request and answers one in fifty with 503."""
    pytest.importorskip("s3fs")
    from moto.server import DomainDispatcherApplication, ThreadedMotoServer

    failed = itertools.count(1)
    failures: list[int] = []
    original = DomainDispatcherApplication.__call__

    def slow(self: Any, environ: Any, start_response: Any) -> Any:
        time.sleep(0.005)
        number = next(failed)
        if environ["REQUEST_METHOD"] == "GET" and number % 50 == 0:
            failures.append(number)
            start_response("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"slow down"]
        return original(self, environ, start_response)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", slow)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield failures
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_from_a_slow_failing_s3_server_come_the_same_batches(
    tmp_path: Path, slow_failing_s3: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(row_groups, "UNIT_ROWS", 400)  # one request a row group, so that some fail
    local = make_dataset(tmp_path, 40_000, 4, row_group=400)
    s3fs.S3FileSystem.clear_instance_cache()
    store = fsspec.filesystem("s3")
    store.mkdir("ratings")
    store.put(str(tmp_path), "ratings/data", recursive=True)
    slow_failing_s3.clear()
    with Loader(Dataset.open("s3://ratings/data"), batch_size=64, seed=1, rank=0, world_size=1) as loader:
        got = [np.stack([b.user.numpy(), b.item.numpy(), b.rating.numpy()], 1) for b in loader.epoch(0)]
    want = epoch_rows(local, batch_size=64)
    assert np.array_equal(np.concatenate(got), want)
    assert len(slow_failing_s3) >= 2
    s3fs.S3FileSystem.clear_instance_cache()


def test_scan_names_a_damaged_row_group(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, 10_000, 1, val_rows=10_000, row_group=33_000)
    path = tmp_path / "val" / "lane-00000.parquet"
    content = bytearray(path.read_bytes())
    content[100:3000] = os.urandom(2900)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"val/lane-00000.parquet, row group 0"):
        list(scan(dataset, "val", range(1)))

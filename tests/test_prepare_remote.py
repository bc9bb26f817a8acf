"""Prepare on an S3 server over HTTP, and with errors that pass: sources, dataset, appends and verification."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfdist import storage
from mfdist.config import parse_config
from mfdist.data.dataset import Dataset, verify
from mfdist.errors import DataError
from mfdist.prepare import sources
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.prepare import PrepareConfig, prepare


def run(*argv: Any) -> Dataset:
    return prepare(parse_config(PrepareConfig, [str(a) for a in argv], "test"))


def content(first: int, end: int) -> bytes:
    return "".join(f"u{k % 97},i{k % 31},{k % 5 + 1},{k}\n" for k in range(first, end)).encode()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bench")
    yield "s3://bench"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def files(dataset: Dataset) -> list[tuple[str, str]]:
    return [(entry.path, entry.checksum) for entry in dataset.manifest.files if "rejected" not in entry.path]


def test_s3_in_and_out(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_bytes(content(0, 2000))
    local = run(tmp_path / "all.csv", "--out", tmp_path / "d", "--lanes", 3)
    storage.write_bytes(f"{bucket}/raw/a.csv", content(0, 900))
    storage.write_bytes(f"{bucket}/raw/b.csv.gz", gzip.compress(content(900, 2000)))
    remote = run(f"{bucket}/raw/*", "--out", f"{bucket}/data", "--lanes", 3)
    assert files(remote) == files(local)
    assert list(verify(remote)) == []
    storage.write_bytes(f"{bucket}/raw/c.csv", content(2000, 2500))
    grown = run(f"{bucket}/raw/c.csv", "--out", f"{bucket}/data", "--append")
    assert sum(grown.manifest.num_ratings.values()) == 2500 and list(verify(grown)) == []
    assert "index.html" in storage.list_names(f"{bucket}/data/report")
    with pytest.raises(DataError, match="no such file"):
        run(f"{bucket}/raw/missing.csv", "--out", f"{bucket}/other")
    assert storage.list_names(f"{bucket}/other") == []


def test_errors_that_pass_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_open, failures = storage.open_read, [0]

    class Flaky(io.BytesIO):
        def read(self, n: int | None = -1) -> bytes:
            failures[0] += 1
            if failures[0] % 3 == 0:
                raise ConnectionResetError("reset by peer")
            return super().read(-1 if n is None else min(n, 700) if n >= 0 else n)

    def flaky_open(path: str) -> Any:
        with true_open(path) as stream:
            return Flaky(stream.read())

    storage.write_bytes("memory://flaky/a.csv", content(0, 1000))
    monkeypatch.setattr(sources, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(storage, "open_read", flaky_open)
    pieces = []
    with sources.Text(find_sources(("memory://flaky/a.csv",))[0]) as text:
        while piece := text.read(300):
            pieces.append(piece)
    assert b"".join(pieces) == content(0, 1000) and failures[0] > 30
    monkeypatch.setattr(storage, "open_read", lambda path: (_ for _ in ()).throw(ConnectionResetError("reset by peer")))
    with pytest.raises(DataError, match="reset by peer"):
        find_sources(("memory://flaky/a.csv",))

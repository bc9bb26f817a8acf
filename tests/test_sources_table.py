"""A table of source files: what is in them, what is typed, and the right rows, or the right sentence.

To add a file that was read wrongly, or that must go on being read: add one :class:`Case` to the list it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.errors import exit_code_of
from mfdist.prepare.prepare import PrepareConfig, prepare

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One or more files, the flags behind them, and what must come of it.

    ``files``: name (folders are made) to content: text, bytes, or an Arrow table that is written as Parquet.
    ``sources``: what is named on the command line, relative to the files' folder; every file where empty.
    ``rows``: (user id, item id, rating[, timestamp]) of every row of the dataset, in any order; None: it is refused.
    ``says``: pieces of what is said: of the sentence on stderr where it is refused, else of all that is printed.
    ``code``: the exit code where it is refused (2 flags, 3 data). ``rejected``: reason to number of refused rows.
    """

    name: str
    files: Mapping[str, str | bytes | pa.Table]
    rows: list[Row] | None = None
    flags: str = ""
    says: tuple[str, ...] = ()
    code: int = 3
    rejected: Mapping[str, int] | None = None
    sources: tuple[str, ...] = ()


THREE = [("u1", "a", 5.0, 100), ("u2", "b", 3.0, 200), ("u1", "c", 4.0, 300)]
TIMELESS = [row[:3] for row in THREE]

HEADERS = [
    Case("no header", {"r.csv": "u1,a,5,100\nu2,b,3,200\nu1,c,4,300\n"}, THREE),
    Case("no header, no time", {"r.csv": "u1,a,5\nu2,b,3\nu1,c,4\n"}, TIMELESS),
    Case("MovieLens", {"r.csv": "userId,movieId,rating,timestamp\nu1,a,5,100\nu2,b,3,200\nu1,c,4,300\n"}, THREE),
    Case("MovieLens dat", {"r.dat": "u1::a::5::100\nu2::b::3::200\nu1::c::4::300\n"}, THREE),
    Case("Book-Crossing", {"r.csv": '"User-ID";"ISBN";"Book-Rating"\n"u1";"a";"5"\n"u2";"b";"3"\n"u1";"c";"4"\n'},
         TIMELESS, "--columns User-ID,ISBN,Book-Rating"),
]  # fmt: skip

IDS = [
    Case("leading zeros", {"r.csv": "007,01,5,1\n7,1,4,2\n"}, [("007", "01", 5.0, 1), ("7", "1", 4.0, 2)]),
    Case("a column of floats beside one of texts",
         {"a.csv": "7,1,5,1\n", "b.parquet": pa.table({"user_id": [7], "item_id": [2.0], "rating": [4.0],
                                                       "timestamp": [2]})},
         [("7", "1", 5.0, 1), ("7", "2", 4.0, 2)]),
]  # fmt: skip

FORMATS = [
    Case("JSON lines of Amazon 2014",
         {"r.json": '{"reviewerID": "u1", "asin": "a", "overall": 5.0, "unixReviewTime": 100}\n'},
         [("u1", "a", 5.0, 100)]),
]  # fmt: skip

FILES = [
    Case("a name that is not there", {}, None, sources=("r.csv",), says=("no such file",)),
    Case("an empty file", {"r.csv": ""}, None, says=("is empty",)),
]

CASES = [*HEADERS, *IDS, *FORMATS, *FILES]


def test_every_case_has_its_own_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_sources(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mfdist.prepare.write_pass.write_dataset_report", lambda *_: None)
    folder = tmp_path / "sources"
    write_files(folder, case.files)
    named = [str(folder / name) for name in case.sources or case.files]
    argv = [*named, "--out", str(tmp_path / "d"), "--lanes", "2", *case.flags.split()]
    code = exit_code_of(lambda: prepare(parse_config(PrepareConfig, argv, "test")) and 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if case.rows is None:
        assert code == case.code, said.out + said.err
        heard = said.err
        assert not (tmp_path / "d").exists()
    else:
        assert code == 0, said.out + said.err
        heard = said.out + said.err
        dataset = Dataset.open(str(tmp_path / "d"))
        assert rows_of(dataset) == sorted(case.rows), heard
        assert dataset.manifest.rejected == (case.rejected or {}), heard
    for words in case.says:
        assert words in heard


def write_files(folder: Path, files: Mapping[str, str | bytes | pa.Table]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def rows_of(dataset: Dataset) -> list[Row]:
    """(user id, item id, rating[, timestamp]) of every row, sorted."""
    users, items = (dataset.ids(side).to_pylist() for side in ("users", "items"))
    found = []
    for entry in dataset.manifest.files:
        if entry.path.split("/")[0] in ("train", "val"):
            table = pq.read_table(dataset.file_path(entry))
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                found.append((users[row[0]], items[row[1]], *row[2:]))
    return sorted(found)

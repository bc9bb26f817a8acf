"""A table of source files: what is in them, what is typed, and the right rows, or the right sentence.

To add a file that was read wrongly, or that must go on being read: add one :class:`Case` to the list it belongs to.
"""

from __future__ import annotations

import gzip
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

ISO_2020 = 1577836800  # 2020-01-01

TIMES = [
    Case("dates", {"r.csv": "u1,a,5,2020-01-01\nu2,b,3,2020-01-02\n"},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020 + 86400)], says=("times are dates and times",)),
    Case("ISO 8601 with and without a zone",
         {"r.csv": "u1,a,5,2020-01-01T00:00:01Z\nu2,b,3,2020-01-01 02:00:00+02:00\nu1,c,4,2020-01-01T00:00:59.9\n"},
         [("u1", "a", 5.0, ISO_2020 + 1), ("u2", "b", 3.0, ISO_2020), ("u1", "c", 4.0, ISO_2020 + 59)]),
    Case("a day that no month has",
         {"r.csv": "u1,a,5,2021-02-28\nu2,b,3,2021-02-29\n"}, [("u1", "a", 5.0, 1614470400)], "--max-rejected 0.5",
         rejected={"timestamp is not a number": 1}),
    *(Case(f"{name} since 1970", {"r.csv": f"u1,a,5,{ISO_2020 * per}\nu2,b,3,{(ISO_2020 + 7) * per}\n"},
           [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020 + 7)], says=(f"times are {name}",))
      for name, per in (("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9))),
    Case("each file has its unit", {"a.csv": f"u1,a,5,{ISO_2020}\n", "b.csv": f"u2,b,3,{ISO_2020 * 1000}\n"},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020)], says=("b.csv: times are milliseconds",)),
    Case("two units in one file",
         {"r.csv": f"u1,a,5,{ISO_2020}000\nu2,b,3,{ISO_2020}000\nu1,c,4,{ISO_2020}\nu3,c,4,0\n"},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020), ("u3", "c", 4.0, 0)], "--max-rejected 0.5",
         rejected={"timestamp is in another unit than the file's": 1}),
    Case("days as YYYYMMDD", {"r.csv": "u1,a,5,20200101\nu2,b,3,20200102\n"},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020 + 86400)], says=("days as YYYYMMDD",)),
    Case("Parquet timestamps, dates, and texts of both",
         {"a.parquet": pa.table({"user_id": ["u1"], "item_id": ["a"], "rating": [5],
                                 "timestamp": pa.array([ISO_2020 * 1000 + 500], pa.timestamp("ms"))}),
          "b.parquet": pa.table({"user_id": ["u2"], "item_id": ["b"], "rating": [3],
                                 "timestamp": pa.array([18262], pa.date32())}),
          "c.parquet": pa.table({"user_id": ["u3", "u4"], "item_id": ["c", "c"], "rating": ["4.5", "1e0"],
                                 "timestamp": ["2020-01-01", "Wed Jan 01 00:00:00 +0000 2020"]})},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, ISO_2020), ("u3", "c", 4.5, ISO_2020),
          ("u4", "c", 1.0, ISO_2020)]),
    Case("JSON times as text and as milliseconds",
         {"a.json": '{"user_id": "u1", "business_id": "a", "stars": 5.0, "date": "2020-01-01 00:00:03"}\n',
          "b.json": '{"user_id": "u2", "asin": "b", "rating": 3, "timestamp": 1577836800123}\n'},
         [("u1", "a", 5.0, ISO_2020 + 3), ("u2", "b", 3.0, ISO_2020)]),
]  # fmt: skip

AMAZON = '{"reviewerID": "u1", "asin": "a", "overall": 5.0, "unixReviewTime": 100, "t": "[\\"{"}'
LOOSE = "{'reviewerID': 'u1', 'asin': 'a', 'overall': 5.0, 'unixReviewTime': 100, 'reviewText': \"it's \\d\"}\n"

FORMATS = [
    Case("JSON lines of Amazon 2014", {"r.json": AMAZON + "\n"}, [("u1", "a", 5.0, 100)]),
    Case("one JSON array in one line", {"r.json": f"[{AMAZON},{AMAZON.replace('u1', 'u2')}]"},
         [("u1", "a", 5.0, 100), ("u2", "a", 5.0, 100)], says=("JSON document",)),
    Case("a JSON array with a record a line, and one that is none",
         {"r.json": f"[\n{AMAZON},\n{{\"asin\": }},\n{AMAZON.replace('u1', 'u2')}\n]\n"},
         [("u1", "a", 5.0, 100), ("u2", "a", 5.0, 100)], "--max-rejected 0.5", rejected={"not valid JSON": 1}),
    Case("JSON printed over lines",
         {"r.json": '{\n  "user_id": 7,\n  "asin": "a",\n  "rating": 5\n}\n{\n  "user_id": 8,\n  "asin": "b",\n'
                    '  "rating": true\n}\n'}, [("7", "a", 5.0), ("8", "b", 1.0)]),
    Case("a JSON array that is cut off", {"r.json": f"[{AMAZON},\n{AMAZON}"}, says=("is not closed",)),
    Case("a JSON array that is cut off in a record", {"r.json": f"[{AMAZON},\n{AMAZON[:30]}"}, says=("is not closed",)),
    Case("a JSON array of arrays", {"r.json": '[["u1", "a", 5]]'}, says=("not of objects",)),
    Case("two JSON arrays in one file", {"r.json": f"[{AMAZON}]\n[{AMAZON}]\n"}, says=("JSON array",)),
    Case("lines of Python literals", {"r.json": LOOSE + "{'reviewerID': open('x'), 'asin': 'b'}\n"},
         [("u1", "a", 5.0, 100)], "--max-rejected 0.5", says=("Python literals",),
         rejected={"not a Python literal": 1}),
    Case("Yelp", {"r.json": '{"review_id": "r", "user_id": "u1", "business_id": "a", "stars": 4.0, "useful": 0, '
                            '"text": "x", "date": "2020-01-01 00:00:00"}\n'}, [("u1", "a", 4.0, ISO_2020)]),
    Case("Goodreads", {"r.json": '{"user_id": "u1", "book_id": "a", "review_id": "r", "rating": 3, "date_added": '
                                 '"Wed Jan 01 00:00:00 -0800 2020"}\n'}, [("u1", "a", 3.0, ISO_2020 + 28800)]),
    Case("LIBMF", {"r.txt": "0 0 3.5\n1 2 4\n 12  0\t1e0 \n"}, [("0", "0", 3.5), ("1", "2", 4.0), ("12", "0", 1.0)]),
    Case("KONECT", {"out.x": "% bip weighted\n% 3 2 2\n1 1 5 881250949\n2 1 3 881250950\nx\n"},
         [("1", "1", 5.0, 881250949), ("2", "1", 3.0, 881250950)], "--max-rejected 0.5",
         rejected={"wrong number of fields": 1}),
    Case("Matrix Market", {"r.mtx": "%%MatrixMarket matrix coordinate real general\n% a comment\n\n3 2 3\n1 1 5.0e+00\n"
                                    "3 2 4\n2 1 1.500000000000000e+00\n"},
         [("1", "1", 5.0), ("3", "2", 4.0), ("2", "1", 1.5)], says=("Matrix Market",)),
    Case("Matrix Market with a place outside", {"r": "%%MatrixMarket matrix coordinate integer general\n2 2 2\n1 1 5\n"
                                                     "3 1 4\n"},
         [("1", "1", 5.0)], "--max-rejected 0.5", rejected={"row or column is outside the matrix": 1}),
    Case("Matrix Market cut off", {"r.mtx": "%%MatrixMarket matrix coordinate integer general\n2 2 2\n1 1 5\n"},
         says=("says that it has 2 entries, and holds 1",)),
    Case("Matrix Market of patterns", {"r.mtx": "%%MatrixMarket matrix coordinate pattern general\n2 2 1\n1 1\n"},
         says=("pattern entries",)),
    Case("Matrix Market, dense", {"r.mtx": "%%MatrixMarket matrix array real general\n1 1\n1\n"}, says=("dense",)),
    Case("Matrix Market, symmetric", {"r.mtx": "%%MatrixMarket matrix coordinate real symmetric\n1 1 1\n1 1 2\n"},
         says=("is symmetric",)),
    Case("decimal commas", {"r.csv": "user;item;rating\nu1;a,b;3,5\nu2;b;4\nu3;c;1.234\n"},
         [("u1", "a,b", 3.5), ("u2", "b", 4.0)], "--max-rejected 0.5", rejected={"rating is not a number": 1},
         says=("decimal commas",)),
    Case("UTF-16", {"r.csv": "u1,ä,5,100\nu2,☃,3,200\n".encode("utf-16"),
                    "b.csv": b"\xfe\xff" + "u1,c,4,300\n".encode("utf-16-be")},
         [("u1", "ä", 5.0, 100), ("u2", "☃", 3.0, 200), ("u1", "c", 4.0, 300)]),
    Case("UTF-16 that is cut off", {"r.csv": "u1,a,5,100\nu2,b,3,200\n".encode("utf-16")[:-1]},
         says=("ends within a character",)),
    Case("UTF-16 without its mark", {"r.csv": "u1,a,5,100\n".encode("utf-16-le")}, says=("UTF-16",)),
    Case("UTF-32", {"r.csv": "u1,a,5,100\n".encode("utf-32")}, says=("UTF-32",)),
    Case("a Parquet column twice", {"r.parquet": pa.table([["u1"], ["a"], [5], [4]],
                                                          names=["user_id", "item_id", "rating", "rating"])},
         says=("2 columns named 'rating'",)),
    Case("a CSV column twice", {"r.csv": "user,item,rating,rating\nu1,a,5,4\n"}, says=("2 columns named 'rating'",)),
    Case("Parquet UUIDs and booleans",
         {"r.parquet": pa.table({"user_id": pa.array([bytes(range(16))], pa.uuid()), "item_id": ["a"],
                                 "rating": [True]})},
         [("00010203-0405-0607-0809-0a0b0c0d0e0f", "a", 1.0)]),
    Case("a Parquet column of booleans as ids",
         {"r.parquet": pa.table({"user_id": [True], "item_id": ["a"], "rating": [5]})},
         says=("column 'user_id' is of type bool",)),
]  # fmt: skip

PART = "userId,movieId,rating,timestamp\nu1,a,5,100\n"

FILES = [
    Case("a name that is not there", {}, None, sources=("r.csv",), says=("no such file",)),
    Case("an empty file", {"r.csv": ""}, None, says=("is empty",)),
    Case("a folder with folders in it", {"f/a.csv": "u1,a,5,100\n", "f/b/c/d.csv": "u2,b,3,200\nu1,c,4,300\n"}, THREE,
         sources=("f",)),
    Case("a glob that matches a folder", {"f/a.csv": "u1,a,5,100\n", "f/b/d.csv": "u2,b,3,200\nu1,c,4,300\n"}, THREE,
         sources=("f/*",)),
    Case("Spark's folder", {"f/_SUCCESS": "", "f/.part-0.csv.crc": "x", "f/part-0.csv": PART, "f/part-1.csv": "",
                            "f/part-2.csv": "userId,movieId,rating,timestamp\n", "f/part-3.csv.gz": gzip.compress(b"")},
         [("u1", "a", 5.0, 100)], sources=("f",), says=("_SUCCESS", "part-1.csv", "part-3.csv.gz")),
    Case("Spark's files by a glob", {"f/_SUCCESS": "", "f/part-0.csv": PART, "f/part-1.csv": ""},
         [("u1", "a", 5.0, 100)], sources=("f/*",), says=("_SUCCESS", "part-1.csv")),
    Case("a folder of empty files", {"f/a.csv": ""}, sources=("f",), says=("is empty",)),
    Case("a file packed and unpacked", {"f/r.csv": "u1,a,5,100\n", "f/r.csv.gz": gzip.compress(b"u1,a,5,100\n")},
         sources=("f",), says=("in two forms",)),
    Case("a file packed and unpacked, both named",
         {"r.csv": "u1,a,5,100\n", "r.csv.gz": gzip.compress(b"u2,b,3,200\nu1,c,4,300\n")}, THREE),
    Case("two files of the same bytes", {"a.csv": "u1,a,5,100\n", "b.csv": "u1,a,5,100\n"}, says=("the same bytes",)),
    Case("a Delta table", {"f/_delta_log/0.json": "{}", "f/a.csv": "u1,a,5,100\n"}, sources=("f",),
         says=("is a Delta table",)),
    Case("the files of a Delta table", {"f/_delta_log/0.json": "{}", "f/y=1/a.csv": "u1,a,5,100\n"},
         sources=("f/*/*.csv",), says=("is a Delta table",)),
    Case("an Iceberg table", {"f/metadata/v1.metadata.json": "{}", "f/data/a.csv": "u1,a,5,100\n"}, sources=("f",),
         says=("is an Iceberg table",)),
    Case("Hive's partitions of Parquet",
         {f"f/year=2020/rating={r}/a.parquet": pa.table({"user_id": [u], "item_id": [i]})
          for u, i, r in (("u1", "a", 5), ("u2", "b", 3))},
         [("u1", "a", 5.0), ("u2", "b", 3.0)], sources=("f",)),
    Case("Hive's partitions of CSV, by a date",
         {f"f/date=2020-01-0{day}/p.csv": f"user,item,rating\nu{day},a,{day}\n" for day in (1, 2)},
         [("u1", "a", 1.0, ISO_2020), ("u2", "a", 2.0, ISO_2020 + 86400)], sources=("f/*/p.csv",)),
    Case("Hive's partitions of JSON, by the user",
         {"f/who=%C3%A4%20b/p.json": '{"item": 7, "rating": 2}\n',
          "f/who=__HIVE_DEFAULT_PARTITION__/p.json": '{"item": 8, "rating": 2}\n'},
         [("ä b", "7", 2.0)], "--columns who,item,rating --max-rejected 0.5", sources=("f",),
         rejected={"empty user id": 1}),
    Case("Hive's partitions of CSV, by the user", {"f/who=u9/p.csv": "item,rating\na,5\nb,3\n"},
         [("u9", "a", 5.0), ("u9", "b", 3.0)], "--columns who,item,rating", sources=("f",)),
    Case("an SQLite database", {"r.csv": b"SQLite format 3\0" + bytes(100)}, says=("an SQLite database",)),
]  # fmt: skip

CASES = [*HEADERS, *IDS, *TIMES, *FORMATS, *FILES]


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

"""A table of source files: what is in them, what is typed, and the right rows, or the right sentence.

To add a file that was read wrongly, or that must go on being read: add one :class:`Case` to the list it belongs to.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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

MARK = "\ufeff"

HEADERS = [
    Case("no header", {"r.csv": "u1,a,5,100\nu2,b,3,200\nu1,c,4,300\n"}, THREE),
    Case("no header, no time", {"r.csv": "u1,a,5\nu2,b,3\nu1,c,4\n"}, TIMELESS),
    Case("MovieLens", {"r.csv": "userId,movieId,rating,timestamp\nu1,a,5,100\nu2,b,3,200\nu1,c,4,300\n"}, THREE),
    Case("MovieLens dat", {"r.dat": "u1::a::5::100\nu2::b::3::200\nu1::c::4::300\n"}, THREE),
    Case("Book-Crossing", {"r.csv": '"User-ID";"ISBN";"Book-Rating"\n"u1";"a";"5"\n"u2";"b";"3"\n"u1";"c";"4"\n'},
         TIMELESS),
    Case("a record number first", {"r.csv": "_id,movie_id,rating_val,user_id\nx,a,5,u1\ny,b,3,u2\nz,c,4,u1\n"}, TIMELESS),
    Case("item before user", {"r.csv": "productId,userId,ratings,timestamp\na,u1,5,100\nb,u2,3,200\nc,u1,4,300\n"},
         THREE),
    Case("types behind the names", {"r.tsv": "item_id:token\tuser_id:token\trating:float\na\tu1\t5\nb\tu2\t3\nc\tu1\t4\n"},
         TIMELESS),
    Case("time before rating", {"r.csv": "user,item,time,rating\nu1,a,100,5\nu2,b,200,3\nu1,c,300,4\n"}, THREE),
    Case("the separator on the first line", {"r.csv": "sep=;\nuser;item;rating\nu1;a;5\nu2;b;3\nu1;c;4\n"}, TIMELESS),
    Case("the separator on the first line, no header", {"r.csv": "sep=;\r\nu1;a;5\r\nu2;b;3\r\nu1;c;4\r\n"}, TIMELESS),
    Case("a frame's index", {"r.csv": ",user,item,rating\n0,u1,a,5\n1,u2,b,3\n2,u1,c,4\n"}, TIMELESS),
    Case("a frame's index, read and written again",
         {"r.csv": "Unnamed: 0,user,item,rating\n0,u1,a,5\n1,u2,b,3\n2,u1,c,4\n"}, TIMELESS),
    Case("row names of R", {"r.csv": '"user","item","rating"\n"1","u1","a",5\n"2","u2","b",3\n"3","u1","c",4\n'}, TIMELESS),
    Case("unnamed columns of a frame", {"r.csv": "0,1,2,3\nu1,a,5,100\nu2,b,3,200\nu1,c,4,300\n"}, THREE,
         says=("taken for the numbers of its columns",)),
    Case("unnamed columns and an index", {"r.csv": ",0,1,2,3\n0,u1,a,5,100\n1,u2,b,3,200\n2,u1,c,4,300\n"}, THREE),
    Case("numbers of columns, typed", {"r.csv": ",0,1,2\n0,a,u1,5\n1,b,u2,3\n2,c,u1,4\n"}, TIMELESS, "--columns 1,0,2"),
    Case("Hive's names", {"r.csv": "ratings.item_id,ratings.user_id,ratings.rating\na,u1,5\nb,u2,3\nc,u1,4\n"}, TIMELESS),
    Case("an id of its own kind", {"r.csv": "user_id,anime_id,rating\nu1,a,5\nu2,b,3\nu1,c,4\n"}, TIMELESS),
    Case("a review's id is no item's", {"r.csv": "review_id,user_id,business_id,stars\nx,u1,a,5\ny,u2,b,3\nz,u1,c,4\n"}, TIMELESS),
    Case("a header that comes again in joined files",
         {"r.csv": "userId,movieId,rating\n" + "u1,a,5\n" * 150 + "userId,movieId,rating\nu2,b,3\n"},
         [("u1", "a", 5.0)] * 150 + [("u2", "b", 3.0)], rejected={"rating is not a number": 1}),
    Case("a damaged first row is no header", {"r.csv": "u1,a,five\n" + "u1,b,3\n" * 150}, [("u1", "b", 3.0)] * 150,
         rejected={"rating is not a number": 1}),
    Case("names that say nothing", {"r.csv": "aa,bb,cc,dd\nu1,a,1400000000,5\nu2,b,1400000100,3\n"}, says=(
        "'aa', 'bb', 'cc', 'dd'", "do not say which is the user, the item, the rating", "--columns aa,bb,dd,cc")),
    Case("two items", {"r.csv": "user_id,song_id,artist_id,rating\n1,2,3,4\n5,6,7,3\n"}, says=(
        "which is the item ('song_id' or 'artist_id')", "--columns user_id,song_id,rating")),
    Case("a session is no item", {"r.csv": "user_id,session_id,what,rating\n1,20,a,5\n1,24,b,3\n"}, says=("the item",)),
    Case("no rating", {"r.csv": "user_id,item_id\n1,20\n1,24\n"}, says=("do not say which is the rating",)),
    Case("names of --columns that are not there", {"r.csv": "a,b,c\nu1,i1,5\nu2,i2,4\n"}, None, "--columns who,what,stars",
         ("no column 'who'", "'a', 'b', 'c'"), code=2),
    Case("names of --columns in another spelling", {"r.csv": "Movie ID,userId,Rating\na,u1,5\nb,u2,3\nc,u1,4\n"}, TIMELESS,
         "--columns user_id,movie_id,rating"),
    Case("names of --columns and no header", {"r.csv": "u1,i1,5\nu2,i2,4\n"}, None, "--columns who,what,stars",
         ("no header with the columns who,what,stars",), code=2),
    Case("roles of a file without header", {"r.csv": "a,u1,5\nb,u2,3\nc,u1,4\n"}, TIMELESS, "--columns item_id,user_id,rating"),
    Case("positions below a header", {"r.csv": "x,y,z\na,u1,5\nb,u2,3\nc,u1,4\n"}, TIMELESS, "--columns 1,0,2"),
    Case("a position that is not there", {"r.csv": "u1,a,5\nu2,b,3\n"}, None, "--columns 0,1,3", ("3 columns",), code=2),
    Case("names of --columns that no JSON line has", {"r.json": '{"user_id": 1, "asin": 2, "rating": 3}\n'}, None,
         "--columns user_id,asin,stars", ("no column 'stars'", "'rating'"), code=2),
    Case("times that are texts of another kind",
         {"r.csv": "user_id,item_id,rating,date_added\nu1,a,5,some day\nu2,b,3,later\nu1,c,4,once\n"}, TIMELESS,
         says=("'date_added', such as 'some day', are no times",)),
    Case("two times", {"r.csv": "user_id,item_id,rating,date_added,date_rated_at,created_at\nu1,a,5,1,2,3\n"},
         [("u1", "a", 5.0)], says=("the time may be 'date_added' or 'created_at'",)),
]  # fmt: skip

HEADERLESS = [
    Case("Amazon 2018, item first", {"r.csv": "".join(f"00017{k:05d},A1C2VKKDCP5H{k:02d},5.0,{1414800000 + k}\n" for k in range(20))},
         [(f"A1C2VKKDCP5H{k:02d}", f"00017{k:05d}", 5.0, 1414800000 + k) for k in range(20)]),
    Case("an index and no names", {"r.csv": "0,u1,a,5\n1,u2,b,3\n2,u1,c,4\n"}, says=("holds no numbers", "--columns 1,2,3")),
    Case("an index before numbers", {"r.csv": "0,196,242,3\n1,186,302,3\n2,22,377,1\n"},
         says=("the first column counts the rows", "--columns 1,2,3")),
    Case("a user a row, numbered as they come", {"r.csv": "0,10,5,1400000000\n1,20,3,1400000001\n2,30,4,1400000002\n"},
         [("0", "10", 5.0, 1400000000), ("1", "20", 3.0, 1400000001), ("2", "30", 4.0, 1400000002)]),
    Case("time in the place of the rating", {"r.csv": "u1,a,1400000000,5\nu2,b,1400000001,3\n"},
         says=("values like times, such as 1400000000", "--columns 0,1,3,2")),
    Case("time in the place of the rating, as typed", {"r.csv": "u1,a,1400000000,5\nu2,b,1400000001,3\nu1,c,1400000002,4\n"},
         [("u1", "a", 5.0, 1400000000), ("u2", "b", 3.0, 1400000001), ("u1", "c", 4.0, 1400000002)], "--columns 0,1,3,2"),
    Case("time first", {"r.csv": "".join(f"{1400000000 + k},{k % 7},{k},{k % 5}\n" for k in range(40))},
         says=("and another column fits better", "--columns 1,2,3,0")),
    Case("rating first", {"r.csv": "5,u1,a\n3,u2,b\n"}, says=("holds no numbers, such as 'a'", "--columns 1,2,0")),
    Case("another rating in every row", {"r.csv": "".join(f"{k % 30},{k % 40},{k + 7}\n" for k in range(120))},
         says=("another value in each of 120 rows",)),
    Case("ratings with decimals, all different", {"r.csv": "".join(f"u{k % 30},i{k % 40},{k / 7:.6f}\n" for k in range(120))},
         [(f"u{k % 30}", f"i{k % 40}", float(np.float32(f"{k / 7:.6f}"))) for k in range(120)],
         says=("each of the first 120 rows has another rating",)),
    Case("sorted by item, a user a row", {"r.csv": "".join(f"u{k},i{k // 4},{k % 5}\n" for k in range(200))},
         [(f"u{k}", f"i{k // 4}", float(k % 5)) for k in range(200)],
         says=("each of the first 200 rows has another user", "200 users, 50 items, 5 different ratings from 0 to 4")),
    Case("fewer users than items by far", {"r.csv": "".join(f"u{k % 2},i{k},{k % 5}\n" for k in range(200))},
         [(f"u{k % 2}", f"i{k}", float(k % 5)) for k in range(200)], says=("2 users, 200 items",)),
    Case("the first records are shown", {"r.csv": "u1,a,5,100\nu2,b,3,200\nu1,c,4,300\nu9,z,1,400\n"},
         [*THREE, ("u9", "z", 1.0, 400)],
         says=("user 'u1', item 'a', rating 5, time 100 (1970-01-01 00:01)", "user 'u1', item 'c', rating 4")),
    Case("times in the column that is named as the rating", {"r.csv": "user,item,rating\nu1,a,1400000000\nu2,b,1400000001\n"},
         [("u1", "a", 1.4e9), ("u2", "b", 1.4e9)], says=("the ratings are numbers like times, such as 1400000000",)),
]  # fmt: skip

IDS = [
    Case("leading zeros", {"r.csv": "007,01,5,1\n7,1,4,2\n"}, [("007", "01", 5.0, 1), ("7", "1", 4.0, 2)]),
    Case("a column of floats beside one of texts",
         {"a.csv": "7,1,5,1\n", "b.parquet": pa.table({"user_id": [7], "item_id": [2.0], "rating": [4.0],
                                                       "timestamp": [2]})},
         [("7", "1", 5.0, 1), ("7", "2", 4.0, 2)]),
    Case("blanks around fields", {"r.csv": "u1, a ,5, 100\n u2\t,b,3 ,200\nu1 ,\tc,\t4,300 \n"}, THREE),
    Case("blanks inside quotes", {"r.csv": '" u1","a ",5,100\nu2, "b, c" ,3,200\n'},
         [(" u1", "a ", 5.0, 100), ("u2", "b, c", 3.0, 200)]),
    Case("a quoted line end behind a blank", {"r.csv": 'u2,b,3,200\nu1, "a\nb" ,5,100\nu3,b,4,300\n'},
         [("u1", "a\nb", 5.0, 100), ("u2", "b", 3.0, 200), ("u3", "b", 4.0, 300)]),
    Case("blanks between two colons", {"r.dat": "u1 :: a::5::100\nu2::b::3 :: 200\nu1::c::4::300\n"}, THREE),
    Case("a field of blanks alone", {"r.csv": "u1,  ,5,100\n" + "u2,b,3,200\n" * 199}, [("u2", "b", 3.0, 200)] * 199,
         rejected={"empty item id": 1}),
    Case("whole floats in text", {"r.csv": "11.0,7.00,5,100\n11,7,3,200\n-0.0,-3.0,4,300\n"},
         [("11", "7", 5.0, 100), ("11", "7", 3.0, 200), ("0", "-3", 4.0, 300)],
         says=("2 user ids are whole numbers written as floats", "2 item ids are")),
    Case("floats that are not whole, and what only looks so",
         {"r.csv": "11.5,007.0,5,100\n1.10,.0,3,200\nv1.0,1.0.0,4,300\n"},
         [("11.5", "007.0", 5.0, 100), ("1.10", ".0", 3.0, 200), ("v1.0", "1.0.0", 4.0, 300)]),
    Case("whole floats in JSON", {"r.json": '{"user_id": 11.0, "item_id": "7.0", "rating": 5}\n'
                                            '{"user_id": 1e3, "item_id": 7, "rating": 4}\n'},
         [("11", "7", 5.0), ("1000", "7", 4.0)], says=("2 user ids", "1 item ids")),
    Case("whole floats in Parquet",
         {"r.parquet": pa.table({"user_id": [11.0, 2.5], "item_id": ["7.0", "7"], "rating": [5, 4]})},
         [("11", "7", 5.0), ("2.5", "7", 4.0)], says=("1 user ids", "1 item ids")),
    Case("one id in every format",
         {"a.csv": "11.0,7,5,100\n", "b.json": '{"user_id": 11, "item_id": 7.0, "rating": 4, "timestamp": 200}\n',
          "c.parquet": pa.table({"user_id": [11.0], "item_id": [7], "rating": [3], "timestamp": [300]})},
         [("11", "7", 5.0, 100), ("11", "7", 4.0, 200), ("11", "7", 3.0, 300)]),
    Case("a byte-order mark in each of joined files", {"r.csv": MARK + "u1,a,5,100\n" + MARK + "u2,b,3,200\n"
                                                       + MARK + '"u1",c,4,300\n'}, THREE),
    Case("a byte-order mark in each gzip member",
         {"r.csv.gz": gzip.compress((MARK + "u1,a,5,100\nu2,b,3,200\n").encode())
                      + gzip.compress((MARK + "u1,c,4,300\n").encode())}, THREE),
    Case("a byte-order mark before joined JSON lines",
         {"r.json": (MARK + '{"user_id": "u1", "item_id": "a", "rating": 5}\n') * 2}, [("u1", "a", 5.0)] * 2),
    Case("a byte-order mark in each of several files",
         {"a.csv": MARK + "u1,a,5,100\n", "b.csv": MARK + "u2,b,3,200\nu1,c,4,300\n"}, THREE),
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
    Case("years", {"r.csv": "u1,a,5,2020\nu2,b,3,1970\n"},
         [("u1", "a", 5.0, ISO_2020), ("u2", "b", 3.0, 0)], says=("times are years",)),
    Case("small numbers are seconds", {"r.csv": "u1,a,5,2020\nu2,b,3,7\n"},
         [("u1", "a", 5.0, 2020), ("u2", "b", 3.0, 7)]),
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
    Case("JSON lines whose first is damaged", {"r.json": f'"{AMAZON}\n{AMAZON}\n{AMAZON.replace("u1", "u2")}\n'},
         [("u1", "a", 5.0, 100), ("u2", "a", 5.0, 100)], "--max-rejected 0.5", rejected={"not valid JSON": 1}),
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
    Case("a file packed and unpacked, both named as a shell does",
         {"r.csv": "u1,a,5,100\n", "r.csv.gz": gzip.compress(b"u1,a,5,100\n")}, says=("in two forms",)),
    Case("a file as CSV and as Parquet", {"f/r.csv": "u1,a,5\n", "f/r.parquet": pa.table({"user": ["u1"]})},
         sources=("f",), says=("in two forms",)),
    Case("Spark's files as a shell names them", {"f/_SUCCESS": "", "f/part-0.csv": PART, "f/part-1.csv": ""},
         [("u1", "a", 5.0, 100)], says=("left out, empty: 2 files", "_SUCCESS")),
    Case("two packings of one name with different rows",
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

CASES = [*HEADERS, *HEADERLESS, *IDS, *TIMES, *FORMATS, *FILES]


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

"""Tables that Spark reads for prepare: the dataset is that of their rows as one Parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_files import sample
from spark_runs import content, ended, skip_where_missing

from mfdist.prepare_spark import lake_tables
from mfdist.prepare_spark.engine import SparkEngine
from mfdist.prepare_spark.session import session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore:PySpark does not yet:FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    skip_where_missing()
    with session("local[2]") as found:
        yield found


@pytest.fixture(scope="module")
def source(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ratings.parquet, and the same rows in orc/ in three parts: text that nobody wants, and rows that are refused."""
    folder = tmp_path_factory.mktemp("tables")
    rows = sample(2000, users=100)
    columns = {
        "review": ["text"] * len(rows), "user id": [row[0] for row in rows], "item_id": [row[1] for row in rows],
        "stars": [None if k % 400 == 7 else float(row[2]) for k, row in enumerate(rows)],
        "when": pa.array([int(row[3]) * 1_000_000 for row in rows], pa.timestamp("us", "UTC")),
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "ratings.parquet")
    spark.read.parquet(str(folder / "ratings.parquet")).repartition(3).write.orc(str(folder / "orc"))
    return folder


FLAGS = ["--columns", "user id,item_id,stars,when", "--lanes", "3", "--split", "time"]


def prepared(argv: list[str], out: Path) -> str:
    with SparkEngine(None) as engine:
        code, said = ended([*argv, "--out", str(out), *FLAGS], engine)
    assert code == 0, said
    assert [path.name for path in out.parent.iterdir()] == [out.name] and not (out / ".tables").exists()
    return said


@pytest.mark.parametrize("kind", ["orc", "table"])
def test_the_dataset_is_that_of_the_same_rows_in_a_file(spark: Any, source: Path, tmp_path: Path, kind: str) -> None:
    name = str(source / "orc")
    if kind == "table":
        spark.read.orc(name).createOrReplaceTempView("ratings_of_users")
        name = "ratings_of_users"
    code, said = ended([str(source / "ratings.parquet"), "--out", str(tmp_path / "one/d"), *FLAGS])
    assert code == 0 and "rejected: rating is not a number: 5" in said
    said = prepared([name, "--engine", "spark", "--source-format", kind], tmp_path / "spark/d")
    assert "rejected: rating is not a number: 5" in said
    one, other = content(tmp_path / "one"), content(tmp_path / "spark")
    apart = {path for path in one if one[path] != other[path]}
    assert one.keys() == other.keys() and apart <= {"d/dataset.json", "d/rejected.parquet", "d/report/index.html"}
    refused = [pq.read_table(tmp_path / place / "d/rejected.parquet") for place in ("one", "spark")]
    assert sorted(refused[0]["text"].to_pylist()) == sorted(refused[1]["text"].to_pylist())
    assert {text.partition(" part ")[0] for text in refused[1]["source"].to_pylist()} == {name}
    manifests = [json.loads((tmp_path / place / "d/dataset.json").read_text()) for place in ("one", "spark")]
    for key in ("num_ratings", "num_users", "num_items", "mean", "histogram", "lanes", "rejected"):
        assert manifests[0].get(key) == manifests[1].get(key), key
    sources = manifests[1]["sources"]
    assert sum(entry["rows"] for entry in sources) == 2000 and {entry["path"] for entry in sources} <= {
        name,
        *(f"{name} part {number}" for number in (1, 2, 3)),
    }
    again = prepared([name, "--engine", "spark", "--source-format", kind], tmp_path / "spark/d")
    assert "is prepared already, from these files with these settings" in again


@pytest.mark.parametrize(
    ("kind", "name", "code", "sentence"),
    [
        ("nosuch", "orc", 2, "Spark has no reader of this name"),
        ("orc", "absent", 3, "Spark finds no such table"),
        ("table", "absent", 3, "Spark finds no such table"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(
    spark: Any, source: Path, tmp_path: Path, kind: str, name: str, code: int, sentence: str
) -> None:
    path = name if kind == "table" else str(source / name)
    with SparkEngine(None) as engine:
        argv = [path, "--out", str(tmp_path / "d"), "--engine", "spark", "--source-format", kind]
        found, said = ended(argv, engine)
    assert found == code and sentence in said and not list(tmp_path.iterdir())


def test_ids_of_a_type_that_no_id_has_are_refused_before_the_copy(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark.createDataFrame([([1, 2], "a", 3.0)], "user_id array<int>, item_id string, rating double").write.orc(
        str(tmp_path / "orc")
    )
    monkeypatch.setattr(lake_tables, "copy", None)
    with SparkEngine(None) as engine:
        argv = [str(tmp_path / "orc"), "--out", str(tmp_path / "d"), "--engine", "spark", "--source-format", "orc"]
        code, said = ended(argv, engine)
    assert code == 3 and "column 'user_id' is of type list" in said and not (tmp_path / "d").exists()


def test_columns_by_position_are_those_of_the_table(spark: Any, source: Path, tmp_path: Path) -> None:
    table = pq.read_table(source / "ratings.parquet").select(["item_id", "stars", "review", "user id"])
    pq.write_table(table, tmp_path / "turned.parquet")
    spark.read.parquet(str(tmp_path / "turned.parquet")).write.orc(str(tmp_path / "orc"))
    place = ["--columns", "3,0,1", "--lanes", "2"]
    code, _ = ended([str(tmp_path / "turned.parquet"), "--out", str(tmp_path / "one/d"), *place])
    with SparkEngine(None) as engine:
        other, said = ended([str(tmp_path / "orc"), "--out", str(tmp_path / "spark/d"), *place, "--engine", "spark",
                             "--source-format", "orc"], engine)  # fmt: skip
    assert code == other == 0, said
    one, two = content(tmp_path / "one"), content(tmp_path / "spark")
    assert {path for path in one if one[path] != two[path]} <= {
        "d/dataset.json",
        "d/rejected.parquet",
        "d/report/index.html",
    }


def test_a_copy_has_large_row_groups(spark: Any, tmp_path: Path) -> None:
    frame = spark.range(0, 50_000, 1, 1).selectExpr("id as user", "id % 7 as item", "1.5 as rating")
    (path,) = lake_tables.copy(spark, frame, ("user", "item", "rating"), str(tmp_path / "copy"))
    metadata = pq.read_metadata(path)
    assert (metadata.num_rows, metadata.num_row_groups) == (50_000, 1)
    assert spark.conf.get("spark.sql.execution.arrow.maxRecordsPerBatch") == "16"
    assert spark.conf.get("spark.sql.files.minPartitionNum", None) is None


def test_parts_of_a_table_may_be_equal(spark: Any, tmp_path: Path) -> None:
    rows = spark.createDataFrame([("u1", "i1", 4.0), ("u2", "i1", 2.0), ("u2", "i2", 5.0)], ["user", "item", "rating"])
    for _ in range(2):
        rows.coalesce(1).write.mode("append").orc(str(tmp_path / "orc"))
    spark.conf.set("spark.sql.files.openCostInBytes", str(64 << 20))
    spark.conf.set("spark.sql.files.maxPartitionBytes", "100")
    try:
        with SparkEngine(None) as engine:
            argv = [str(tmp_path / "orc"), "--engine", "spark", "--source-format", "orc", "--duplicates", "last"]
            code, said = ended([*argv, "--out", str(tmp_path / "d"), "--lanes", "1"], engine)
    finally:
        spark.conf.unset("spark.sql.files.openCostInBytes")
        spark.conf.unset("spark.sql.files.maxPartitionBytes")
    assert code == 0 and "rows in 6" in said, said
    sources = json.loads((tmp_path / "d/dataset.json").read_text())["sources"]
    assert len(sources) == 2 and sources[0]["fingerprint"] == sources[1]["fingerprint"]


def test_what_a_killed_job_has_left_is_replaced_and_other_settings_copy_nothing(
    spark: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "d/.tables/0/000000-1.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"cut off")
    monkeypatch.chdir(tmp_path / "d")
    argv = [str(source / "orc"), "--out", ".", "--engine", "spark", "--source-format", "orc"]
    with SparkEngine(None) as engine:
        code, said = ended([*argv, *FLAGS], engine)
    assert code == 0 and not Path(".tables").exists(), said
    monkeypatch.setattr(lake_tables, "copy", None)
    with SparkEngine(None) as engine:
        code, said = ended([*argv, *FLAGS, "--seed", "9"], engine)
    assert code == 2 and "of other files or settings" in said


def test_a_table_named_twice_counts_once_and_is_not_both(spark: Any, source: Path, tmp_path: Path) -> None:
    name = str(source / "orc")
    said = prepared([name, name, "--engine", "spark", "--source-format", "orc"], tmp_path / "d")
    assert "rows in 2,000" in said
    with SparkEngine(None) as engine:
        code, said = ended([name, "--val", name, "--out", str(tmp_path / "e/d"), "--engine", "spark",
                            "--source-format", "orc", "--columns", "user id,item_id,stars"], engine)  # fmt: skip
    assert code == 2 and "choose one" in said


def test_a_dry_run_shows_the_first_records_and_copies_nothing(
    spark: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mfdist.jobs.prepare import main

    argv = [str(source / "orc"), "--dry-run", "--engine", "spark", "--source-format", "orc", *FLAGS]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "user 'u" in said and "nothing was written" in said

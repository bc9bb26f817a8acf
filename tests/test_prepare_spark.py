"""Prepare on Spark: the dataset of one machine, byte for byte; and what is said where Spark is not there.

Each test runs twice: on frames of this process in Spark's place, and on Spark. Java is not part of the Python
environment: without it, or without PySpark, the second skips and says so.
"""

from __future__ import annotations

import random
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepare_files import bare, sample, write_csv  # noqa: F401
from spark_runs import check_equal, content, ended, spark_session  # noqa: F401
from test_prepare import FORMATS, write_as
from test_sources_table import CASES, Case, write_files

from mfdist.config import parse_config
from mfdist.errors import UsageError, exit_code_of
from mfdist.prepare import readers
from mfdist.prepare.columns import recognise
from mfdist.prepare.config import PrepareConfig
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.row_checks import Rules
from mfdist.prepare_spark import driver, engine, messages, pieces, session

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def bad_rows(rows: list[Any]) -> list[Any]:
    """Rows with some among them that are refused, and pairs that come again."""
    rng = random.Random(1)
    rows = [*rows, *rows[:50]]
    for k in range(0, len(rows), 97):
        user, item, _, time = rows[k]
        rows[k] = (user, item, "five", time)
    rng.shuffle(rows)
    return rows


def test_the_dataset_is_that_of_one_machine(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files cut into pieces for tasks, bad rows, duplicates, minimum counts, blocks, a time split; then an append."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(pieces, "TASK_BYTES", 4000)
    monkeypatch.setattr(driver, "PART_BYTES", 8000)
    rows = sample(3000, users=150, repeats=True)
    write_csv(tmp_path / "a.csv", bad_rows(rows[:1500]))
    write_as("gz", tmp_path, rows[1500:2500])
    argv = [str(tmp_path / "a.csv"), str(tmp_path / "ratings.gz"), "--lanes", "3", "--max-rejected", "0.5"]
    code, said = check_equal(tmp_path / "plain", argv)
    assert code == 0 and "rejected: rating is not a number: 16" in said
    shape = ["--order", "blocks", "--duplicates", "mean", "--min-user-ratings", "10", "--min-item-ratings", "20"]
    code, said = check_equal(tmp_path / "core", [*argv, *shape, "--split", "time"])
    assert code == 0 and "filtered 0" not in said, said
    later = write_as("json23", tmp_path, [(f"new{row[0]}", *row[1:]) for row in rows[2500:]] + rows[:40])
    code, said = check_equal(tmp_path / "plain", [str(later), "--append"])
    assert code == 0 and "rows in 540" in said


def test_what_executors_do_not_see_is_said_before_the_work(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of OUT, a source; late ones are waited for."""
    monkeypatch.setattr(session, "LATE_SECONDS", 0.5)
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.write_text("")
    with engine.session(None) as running:
        session.check_shared(running, str(tmp_path / "d"), "OUT", [str(there)])
        assert not [*(tmp_path / "d").iterdir()]
        with pytest.raises(UsageError, match=r"/absent is not to be seen on all executors"):
            session.check_shared(running, str(tmp_path / "d"), "OUT", [str(there), str(absent)])
        monkeypatch.setattr(session.storage, "write_text", lambda path, text: None)
        with pytest.raises(UsageError, match=r"^OUT is another folder on the executors than on the driver"):
            session.check_shared(running, str(tmp_path / "d"), "OUT", [str(there)])
    monkeypatch.setattr(session, "LATE_SECONDS", 20.0)
    later = threading.Timer(0.5, absent.write_text, [""])
    later.start()
    (found,) = session.missing_task([str(absent)])(iter([]))
    assert found.num_rows == 0
    later.join()


@pytest.mark.parametrize(
    "flags", ["--engine spark --compact d", "--spark-master local[2] a.csv --out d", "--source-format orc a --out d"]
)
def test_flags_that_are_of_no_use(flags: str) -> None:
    with pytest.raises(UsageError, match=r"one machine|--engine spark"):
        parse_config(PrepareConfig, flags.split(), "test")


@pytest.mark.parametrize("missing", ["pyspark", "java", "old java"])
def test_without_spark_or_java_one_sentence_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mfdist.jobs.prepare import main

    if missing == "pyspark":
        monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    else:
        pytest.importorskip("pyspark", reason="PySpark is not installed")
        home = tmp_path / "jdk"
        if missing == "old java":
            (home / "bin").mkdir(parents=True)
            (home / "bin/java").write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
            (home / "bin/java").chmod(0o755)
        monkeypatch.setenv("JAVA_HOME", str(home))
    (tmp_path / "a.csv").write_text("u1,a,5\nu2,b,3\n")
    argv = [str(tmp_path / "a.csv"), "--out", str(tmp_path / "d"), "--engine", "spark"]
    assert exit_code_of(lambda: main(argv)) == 2
    said = capsys.readouterr().err
    words = {"pyspark": 'pip install "mfdist[spark]"', "java": "which has no bin/java", "old java": "is Java 11"}
    assert said.startswith("error: --engine spark needs ") and words[missing] in said and said.count("\n") == 1
    assert not (tmp_path / "d").exists()


def test_a_dry_run_says_what_the_work_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mfdist.jobs.prepare import main
    from mfdist.prepare_spark import engine

    monkeypatch.setattr(engine, "check_installed", lambda: None)
    path = write_csv(tmp_path / "a.csv", sample(2000))
    monkeypatch.setattr(pieces, "TASK_BYTES", path.stat().st_size // 4)
    monkeypatch.setattr(engine, "PART_BYTES", path.stat().st_size // 8)
    assert main([str(path), "--dry-run", "--engine", "spark"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"on Spark: about [12],\d{3} rows, [45] tasks read, (8|16) sort; 1 executor of 4 cores .* 2\.0 GiB", said
    ), said
    assert not list(tmp_path.glob("d*"))


QUOTED = [((f"u,{k}", "two\nlines", f'u"{k}"')[k % 3], f"i{k % 7}", float(k % 5), 10**9 + k) for k in range(120)]


@pytest.mark.parametrize("kind", ["csv", "no-end", "bom", "quoted", "crlf", "header", "json14"])
@pytest.mark.parametrize("size", [50, 333, 5000])
def test_a_cut_file_gives_the_pieces_of_one_machine(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same blocks, from pieces read by their bytes: with a mark, a header, quoted line ends, no last line end."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", size)
    monkeypatch.setattr(pieces, "TASK_BYTES", 2 * size)
    path = write_as(kind, tmp_path, QUOTED if kind == "quoted" else sample(300))
    (source,) = find_sources((str(path),))
    layout, rules = recognise(source, None), Rules(0, None, True)
    whole = [block for block, _ in pieces.blocks(pieces.Work(0, 0, source, layout), rules)]
    cut = pieces.cut(source, layout, rules)
    works = pieces.works([source], [layout], {0: cut})
    assert len(works) > 1 or source.bytes <= 2 * size
    parts = [block for work in works for block, _ in pieces.blocks(work, rules)]
    assert whole.pop() == cut.fingerprint and len(parts) == len(whole)
    for a, b in zip(parts, whole, strict=True):
        assert not isinstance(a, str) and not isinstance(b, str)
        assert (a.lines, a.num_in, a.rejects) == (b.lines, b.num_in, b.rejects)
        assert a.hashes[0][0].tolist() == b.hashes[0][0].tolist() and a.rating.tolist() == b.rating.tolist()
        assert a.time is not None and b.time is not None and a.time.tolist() == b.time.tolist()


def test_batches_give_back_what_they_were_made_of() -> None:
    """pyarrow keeps a buffer for ever that it makes an array of: a worker would hold all rows that it has sent."""
    data = bytes(range(200))
    references = sys.getrefcount(data)
    parts = enumerate([data, pa.py_buffer(data)])
    sent = [*messages.to_batches(messages.Message(1, 2, 3, number, part) for number, part in parts)]
    del parts
    assert [(m.target, m.number, bytes(m.data)) for m in messages.from_batches(sent)] == [(1, 0, data), (1, 1, data)]
    del sent
    assert sys.getrefcount(data) == references


def test_what_spark_says_becomes_a_sentence() -> None:
    text = (
        "An error occurred while calling o77.collectToPython.\n: org.apache.spark.SparkException: Job aborted due to "
        "stage failure: Task 0 in stage 1.0 failed 4 times\nTraceback (most recent call last):\n  File x\n"
        "OSError: [Errno 28] No space left on device.\n"
    )
    assert session.reason_of(text) == "OSError: [Errno 28] No space left on device"
    assert "stage failure" in session.reason_of(text.partition("Traceback")[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(spark: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TASK_BYTES", 3000)
    monkeypatch.setattr(driver, "PART_BYTES", 8000)
    assert check_equal(tmp_path, [str(write_as(kind, tmp_path, sample())), "--lanes", "4"])[0] == 0


@pytest.mark.slow
def test_a_large_parquet_file_is_cut_by_row_groups(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TASK_BYTES", 3000)
    rows = sample()
    columns = {name: [row[k] for row in rows] for k, name in enumerate(("user", "item", "rating", "timestamp"))}
    columns["rating"] = [None if k % 100 == 7 else value for k, value in enumerate(columns["rating"])]
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=130)
    code, said = check_equal(tmp_path, [str(tmp_path / "r.parquet"), "--lanes", "2", "--max-rejected", "0.5"])
    assert code == 0 and "rejected: rating is not a number: 20" in said


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_table_of_sources(spark: Any, case: Case, tmp_path: Path) -> None:
    write_files(tmp_path / "sources", case.files)
    named = [str(tmp_path / "sources" / name) for name in case.sources or case.files]
    code, _ = check_equal(tmp_path, [*named, "--lanes", "2", *case.flags.split()])
    assert code == (case.code if case.rows is None else 0)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 6), st.integers(1, 5), st.integers(0, 20)), min_size=1,
                  max_size=150),
    bad=st.sets(st.integers(0, 149), max_size=5),
    files=st.integers(1, 3),
    split=st.sampled_from(["random", "last-n", "time"]),
    duplicates=st.sampled_from(["keep", "last", "mean", "error"]),
    least=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    order=st.sampled_from(["random", "blocks"]),
    lanes=st.integers(1, 5),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_any_rows_and_flags(
    spark: Any, tmp_path_factory: pytest.TempPathFactory, rows: list[Any], bad: set[int], files: int, split: str,
    duplicates: str, least: tuple[int, int], order: str, lanes: int, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    shown = [(f"u{u}", f"i{i}", "x" if k in bad else r, t) for k, (u, i, r, t) in enumerate(rows)]
    named = [str(write_csv(folder / f"{k}.csv", shown[k::files], header="user,item,rating,time"))
             for k in range(files) if shown[k::files]]  # fmt: skip
    check_equal(folder, [
        *named, "--split", split, "--duplicates", duplicates, "--min-user-ratings", str(least[0]),
        "--min-item-ratings", str(least[1]), "--order", order, "--lanes", str(lanes), "--seed", str(seed),
        "--max-rejected", "1"])  # fmt: skip


@pytest.mark.slow
def test_a_validation_set_of_its_own(spark: Any, tmp_path: Path) -> None:
    rows = sample(repeats=True)
    train, val = (write_csv(tmp_path / f"{name}.csv", part) for name, part in (("a", rows[:1600]), ("b", rows[1500:])))
    code, said = check_equal(tmp_path, [str(train), "--val", str(val), "--lanes", "3", "--duplicates", "last"])
    assert code == 0 and "trained on too" in said


@pytest.mark.slow
def test_ids_that_collide_begin_again_with_another_hash(
    spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of a task: the driver begins again with the next salt, as one machine does."""
    from mfdist.prepare.ids import HashCollision

    path = write_csv(tmp_path / "a.csv", sample())
    first = driver.settled
    calls = []

    def once(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise HashCollision
        return first(*given)

    monkeypatch.setattr(driver, "settled", once)
    from mfdist.prepare_spark.engine import SparkEngine

    code, said = ended([str(path), "--out", str(tmp_path / "d"), "--lanes", "2"], SparkEngine(None))
    assert code == 0 and "beginning again with another hash" in said and len(calls) == 2
    assert b'"salt": 1' in content(tmp_path / "d")["dataset.json"]


@pytest.mark.slow
def test_a_real_report(spark: Any, tmp_path: Path) -> None:
    """With figures and page: all of the directory is the same."""
    assert check_equal(tmp_path, [str(write_csv(tmp_path / "a.csv", sample()))])[0] == 0
    assert "report/ratings_per_user.png" in content(tmp_path / "spark/d")

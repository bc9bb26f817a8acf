"""What text an id is: one rule, in Python, compiled, and in files of ids."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mfdist.data.id_text import OLD_IDS, float_text, id_text, id_texts, plain_id
from mfdist.errors import UsageError
from mfdist.prepare.ids import plain_ids
from mfdist.results.id_files import read_id_file

TEXTS = st.one_of(st.text(alphabet="-0123.a", max_size=8), st.from_regex(r"-?\d{1,3}\.0{1,3}", fullmatch=True))


@settings(deadline=None)  # the first call compiles
@given(st.lists(TEXTS, max_size=20))
@example(["11.0", "-0.0", "-3.00", "0.0", "00.0", ".0", "-.0", "1.", "", "0", "10", "1.10", "100.0"])
def test_the_compiled_rule_is_the_plain_one(texts: list[str]) -> None:
    content = np.frombuffer("".join(texts).encode(), np.uint8)
    length = np.array([len(text.encode()) for text in texts], np.int64)
    start = np.cumsum(length) - length
    changed = plain_ids(content, start, length)
    found = [content[s : s + n].tobytes().decode() for s, n in zip(start, length, strict=True)]
    assert found == [plain_id(text) for text in texts]
    assert changed == sum(plain_id(text) != text for text in texts)
    assert all(re.search(OLD_IDS, text) for text in texts if plain_id(text) != text)


@settings(deadline=None)
@given(st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_texts_are_one_id(value: float) -> None:
    assert id_text(value) == id_text(float_text(value)) == id_text(id_text(value))
    if value == int(value):
        assert id_text(value) == str(int(value))


def test_ids_of_python() -> None:
    assert id_texts([11, 11.0, "11.0", "11", np.float32(11), np.int8(11)]) == ["11"] * 6
    assert id_texts(pa.chunked_array([["7.0", " 7"], ["007"]])) == ["7", " 7", "007"]
    assert id_texts([-0.0, "-0.0", 2.5, 1e20, "1e20"]) == ["0", "0", "2.5", "1" + "0" * 20, "1e20"]
    for value in (None, True, float("nan"), b"7", [1]):
        with pytest.raises(UsageError, match="cannot be an id"):
            id_text(value)


MARK = "\ufeff"


@pytest.mark.parametrize(
    ("content", "ids"),
    [("u1\n 11.0 \n\nu 2\t\n007", ["u1", "11", "u 2", "007"]), (MARK + "u1\n" + MARK + "u2\r\n", ["u1", "u2"]),
     ("user_id\nu1\n11.00\n", ["u1", "11"]), ("name, userId\nA, u1 \n'B', \" u2\"\n,11.0\n,\n", ["u1", " u2", "11"]),
     (MARK + "item_id\tuser_id:token\nx\tu1\n" + MARK + "y\t 3.0\n", ["u1", "3"]), ('user_id\n"a""b,c"\n', ['a"b,c'])],
)  # fmt: skip
def test_files_of_ids_follow_the_rule(content: str, ids: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ids"
    path.write_bytes(content.encode())
    file = read_id_file(str(path), "users", "user_id")
    assert (file.ids or file.user_ids) == ids
    pq.write_table(pa.table({"user_id": [11.0, None, 2.0]}), path)
    assert read_id_file(str(path), "users", "user_id").ids == ["11", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"user_id,item_id\na,b\na,b,c\n", "line 3: wrong number of fields"),
     (b"user_id,item_id\na,b\na, \n", "line 3: empty item"), (b"\xff\xfe\n", "neither text"),
     (b"user_id\n\xff\n", "not valid UTF-8")],
)  # fmt: skip
def test_files_of_ids_that_cannot_be_read_are_explained(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_id_file(str(tmp_path / "ids"), "deny", "item_id")

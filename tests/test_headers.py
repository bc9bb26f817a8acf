"""Which column is what: names in every spelling, headers of every kind; a wrong column is never read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mfdist.errors import DataError, UsageError
from mfdist.prepare.columns import parse_columns, recognise
from mfdist.prepare.headers import is_header, meaning_of, numbered, spellings
from mfdist.prepare.input_files import find_sources
from mfdist.prepare.readers import chunks, parse
from mfdist.prepare.row_checks import Rules
from mfdist.results.block_ids import texts_of

NAMES = {
    "user": ["user_id", "userId", "user", "User-ID", "uid", "reviewerID", "customer_id", "user_id:token", "USERID",
             "t.user_id", "review/userId", "user.id", "User (ID)"],
    "item": ["item_id", "itemId", "item", "asin", "parent_asin", "productId", "movieId", "movie_id", "anime_id", "ISBN",
             "business_id", "book_id", "item_id:token", "product/productId", "gadgetId", "widget_id:token"],
    "rating": ["rating", "ratings", "score", "stars", "overall", "rating_val", "Book-Rating", "star_rating",
               "rating:float", "review/score", "Rating"],
    "time": ["timestamp", "unixReviewTime", "time", "date", "timestamp:float", "unix_time", "review/time", "ts"],
}  # fmt: skip
EXTRA = ["title", "review_id", "helpful", "session_id", "text"]


@pytest.mark.parametrize(
    ("names", "places"),
    [("user_id,item_id,rating,timestamp", (0, 1, 2, 3)), ("_id,movie_id,rating_val,user_id", (3, 1, 2, -1)),
     ("asin,parent_asin,user_id,rating,timestamp", (2, 1, 3, 4)), ("user,user_id,item,item_id,rating", (1, 3, 4, -1)),
     ("reviewerID,asin,reviewerName,helpful,reviewText,overall,summary,unixReviewTime,reviewTime", (0, 1, 5, 7)),
     ("marketplace,customer_id,review_id,product_id,product_parent,star_rating,total_votes", (1, 3, 5, -1)),
     ("review_id,user_id,business_id,stars,useful,funny,cool,text,date", (1, 2, 3, 8)),
     ("user_id,book_id,is_read,rating,is_reviewed", (0, 1, 3, -1)), ("name,movie,stars", (-1, 1, 2, -1)),
     ("user_id,session_id,rating", (0, -1, 2, -1)), ("user_id,song_id,artist_id,rating", (0, -1, 3, -1)),
     ("user_id,user_id,item_id,rating", (-1, 2, 3, -1)), ("user_id,paid,valid,rating", (0, -1, 3, -1))],
)  # fmt: skip
def test_what_names_say(names: str, places: tuple[int, ...]) -> None:
    assert meaning_of(names.split(",")).places == places


@pytest.mark.parametrize("role", NAMES)
def test_every_spelling_is_known(role: str) -> None:
    place = list(NAMES).index(role)
    for name in NAMES[role]:
        names = ["user_id", "item_id", "rating", "timestamp"]
        names[place] = name
        assert meaning_of(names).places == (0, 1, 2, 3), name


def test_spellings() -> None:
    assert {spellings(name)[0] for name in ("userId", "User-ID", "user_id:token", " user id ", '"USER_ID"')} == {
        "userid"
    }
    assert "userid" in spellings("ratings.user_id") and "userid" in spellings("review/userId")


def test_headers_of_numbers() -> None:
    assert numbered(["0", "1", "2"]) and numbered(["", "0", "1", "2"]) and not numbered(["1", "2", "3"])
    assert not numbered(["0"]) and not numbered(["", "0"])
    assert is_header(["0", "1", "2"], [], None, False) and not is_header(["0", "1"], [], None, True)


@pytest.mark.parametrize(
    ("text", "places"),
    [("user_id,item_id\na,b\n", (0, 1, -1)), ("item,user,stars\na,b,3\n", (1, 0, 2)), ("u1,i1\nu2,i2\n", (0, 1, -1)),
     ("1,2\n3,4\n", (0, 1, -1)), ("0,1\n0,2\n", (0, 1, -1)), ("u1,i1,3\nu2,i2,4\n", (0, 1, 2))],
)  # fmt: skip
def test_pairs(text: str, places: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    (source,) = find_sources((str(tmp_path / "p.csv"),))
    layout = recognise(source, None, pairs=True)
    assert layout.columns == (*places, -1) and layout.header == text.startswith(("user", "item"))


@pytest.mark.parametrize(
    ("text", "guess"),
    [("x,y\n1,2\n3,4\n", "x,y"), ("who,what\nu1,i1\nu2,i2\n", "who,what"), ("user_id,foo\na,b\n", "user_id,foo")],
)
def test_pairs_whose_names_say_nothing(text: str, guess: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    (source,) = find_sources((str(tmp_path / "p.csv"),))
    with pytest.raises(DataError, match=f"for example --columns {guess}"):
        recognise(source, None, pairs=True)
    assert recognise(source, tuple(guess.split(",")), pairs=True).columns == (0, 1, -1, -1)


def random_file(
    rng: random.Random,
) -> tuple[str, list[str], bool, dict[str, int], list[tuple[str, str, float, int | None]]]:
    """(text, names, whether it has them as header, place of each role, the rows)."""
    n = rng.randint(40, 60)
    users = rng.choice([lambda k: f"u{k}", str, lambda k: f"{k:05x}-ab", lambda k: str(70_000 + k)])
    items = rng.choice([lambda k: f"i{k}", str, lambda k: f"B{k:09d}", lambda k: str(3000 + 7 * k)])
    scale = rng.choice([["1", "2", "3", "4", "5"], ["0.5", "1.0", "1.5", "4.0", "5.0"], [str(k) for k in range(11)]])
    order = rng.sample(range(400), n)
    columns = {
        "user": [users(k % 37) for k in order],
        "item": [items(k) for k in rng.sample(range(400), n)],
        "rating": [*scale, *(rng.choice(scale) for _ in range(n - len(scale)))],
    }
    rng.shuffle(columns["rating"])
    if rng.random() < 0.6:
        columns["time"] = [str(rng.randint(1_300_000_000, 1_400_000_000)) for _ in range(n)]
    header = rng.random() < 0.6
    roles = list(columns)
    rng.shuffle(roles)
    if not header and roles.index("user") > roles.index("item"):  # which of two ids is the user's, no value says
        a, b = roles.index("user"), roles.index("item")
        roles[a], roles[b] = roles[b], roles[a]
    names = [rng.choice(NAMES[role]) for role in roles]
    if header:
        for name in rng.sample(EXTRA, rng.randint(0, 2)):
            place = rng.randint(0, len(roles))
            roles.insert(place, name)
            names.insert(place, name)
            columns[name] = [f"{name} {k}" for k in range(n)]
    if rng.random() < 0.3:
        roles.insert(0, "index")
        names.insert(0, rng.choice(["", "Unnamed: 0", "_id", "index", "id"]))
        first = rng.choice([0, 1])
        columns["index"] = [str(k + first) for k in range(n)]
    separator = rng.choice([",", "\t", ";", "|"] if header else [",", "\t", ";", "|", "::"])
    quote = '"' if separator != "::" and rng.random() < 0.3 else ""
    end = rng.choice(["\n", "\r\n"])
    rows = zip(*(columns[role] for role in roles), strict=True)
    lines = [separator.join(f"{quote}{field}{quote}" for field in row) for row in [*([names] if header else []), *rows]]
    mark = f"sep={separator}{end}" if rng.random() < 0.1 and separator != "::" else ""
    text = ("\ufeff" if rng.random() < 0.1 else "") + mark + end.join(lines) + end * rng.randint(0, 1)
    times = [int(t) for t in columns["time"]] if "time" in columns else [None] * n
    ratings = [float(r) for r in columns["rating"]]
    known = list(zip(columns["user"], columns["item"], ratings, times, strict=True))
    return text, names, header, {role: roles.index(role) for role in roles}, known


def check_random_file(seed: int, path: Path) -> str:
    """Read it with a random ``--columns``: 'read' (the right rows) or 'refused' (with a sentence)."""
    rng = random.Random(seed)
    text, names, header, places, rows = random_file(rng)
    path.write_text(text, newline="")
    order = [role for role in ("user", "item", "rating", "time") if role in places]
    how = rng.choice(["", "", "", "names", "positions", "wrong names", "unknown header"])
    columns, must = "", ""
    if how == "positions":
        columns, must = ",".join(str(places[role]) for role in order), "read"
    elif how == "names" and header and not any("," in name for name in names):
        columns, must = ",".join(names[places[role]] for role in order), "read"
    elif how == "wrong names":
        columns, must = ",".join(f"wrong{k}" for k in range(len(order))), "refused"
    elif header and how == "unknown header":
        path.write_text(
            text.replace(names[places["user"]], "Lorem", 1).replace(names[places["rating"]], "Ipsum", 1), newline=""
        )
        must = "refused"
    elif header:
        must = "read"
    try:
        (source,) = find_sources((str(path),))
        layout = recognise(source, parse_columns(columns) if columns else None)
        rules = Rules(0, None, layout.has_time)
        found: list[tuple[str, str, float, int | None]] = []
        for piece in chunks(source, layout):
            if not isinstance(piece, str):
                block = parse(piece, layout, rules)
                ids = [texts_of(block, side).to_pylist() for side in range(2)]
                times = [None] * block.rating.size if block.time is None else block.time.tolist()
                found += zip(*ids, block.rating.tolist(), times, strict=True)
        outcome = "read" if found else "refused"  # every row refused is an error of the read pass
    except (DataError, UsageError) as error:
        assert "--columns" in str(error), f"seed {seed}: {error}"
        found, outcome = [], "refused"
    shown = f"seed {seed}, {how or 'no flag'}: {names if header else 'no header'}, {places}, {columns}\n{text[:300]}"
    assert not must or outcome == must, f"{must} is right: {shown}"
    if outcome == "read":
        assert found == rows, shown
    return outcome


def test_random_headers_are_read_right_or_refused(tmp_path: Path) -> None:
    outcomes = [check_random_file(seed, tmp_path / "r.csv") for seed in range(250)]
    assert outcomes.count("read") > 100 and outcomes.count("refused") > 30


@pytest.mark.slow
def test_two_thousand_random_headers(tmp_path: Path) -> None:
    for seed in range(250, 2250):
        check_random_file(seed, tmp_path / "r.csv")

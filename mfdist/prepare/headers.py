"""What the names of columns say: which is the user's, the item's, the rating, the time; and whether a row is a header.

Names are compared without case, separators and type suffixes: ``userId``, ``User-ID``, ``user_id:token`` and
``ratings.user_id`` are one name. Each role has a few ranks of names: the first rank that occurs decides, and where two
columns of it occur nothing is decided.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mfdist.errors import DataError, UsageError
from mfdist.prepare.plausible import facts_of, is_number
from mfdist.prepare.row_checks import parse_time

ROLES = ("user_id", "item_id", "rating", "timestamp")
Values = Callable[[str], Sequence[str]]
"""The first texts of a column, by its name."""
WORDS = ("the user", "the item", "the rating", "the time")
_USER_IDS = """uid reviewerid customerid memberid accountid visitorid profileid raterid authorid playerid readerid
    viewerid clientid personid subscriberid buyerid shopperid listenerid userindex useridx userno usernumber"""
_ITEM_IDS = """iid asin productid movieid filmid bookid isbn isbn13 isbn10 businessid songid trackid artistid albumid
    gameid appid animeid mangaid recipeid beerid wineid jokeid restaurantid articleid newsid videoid showid seriesid
    courseid hotelid placeid poiid venueid locationid listingid goodsid sku skuid podcastid itemindex itemidx itemno
    itemnumber gmapid gmapsid"""
_USERS = "user users reviewer customer member visitor rater reader viewer"
_ITEMS = """item items product movie film book business song track artist album game app anime manga recipe beer
    wine joke restaurant article video show series course hotel place venue podcast"""
_RATINGS = """ratings overall score scores star stars starrating ratingval ratingvalue ratingscore userrating userscore
    bookrating movierating itemrating reviewrating reviewscore reviewoverall myrating myscore ratinggiven rate rui"""
_TIMES = """timestamp timestamps unixreviewtime unixtime unixtimestamp unixtimestamps epoch epochtime epochseconds ts
    tstamp ratingtimestamp reviewtimestamp timestampms timems"""
_DATES = """time datetime date reviewtime reviewdate ratingtime ratingdate ratedat createdat created dateadded
    datecreated datetimecreated eventtime checkintime"""


def _ranks(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(rank.split()) for rank in names)


RANKS: dict[str, tuple[frozenset[str], ...]] = {
    "user_id": _ranks("userid", _USER_IDS, _USERS, "username reviewername profilename"),
    "item_id": _ranks("itemid", "parentasin", _ITEM_IDS, _ITEMS),
    "rating": _ranks("rating", _RATINGS),
    "timestamp": _ranks(_TIMES, _DATES),
}
"""Plain names of each role (see :func:`spellings`), the surest first."""
(_RECORD_IDS,) = _ranks(
    """id reviewid ratingid sessionid orderid transactionid eventid rowid recordid requestid commentid logid
    interactionid impressionid deviceid parentid categoryid cityid countryid regionid storeid sellerid vendorid brandid
    genreid tagid"""
)
_ENDS_IN_ID = re.compile(r"(?i:[\W_]id)$|[a-z0-9]I[dD]$")


def spellings(name: str) -> tuple[str, ...]:
    """A name without case, separators, type suffix and unit; and its last part alone, behind a dot or a slash."""
    bare = re.sub(r":[A-Za-z_0-9]+$", "", name.strip().strip("\"'\ufeff").strip())
    bare = re.sub(r"\s*[(\[][^()\[\]]*[)\]]$", "", bare)
    whole, last = (re.sub(r"[\W_]+", "", text).lower() for text in (bare, re.split(r"[./]", bare)[-1]))
    return (whole,) if whole == last or not last else (whole, last)


@dataclass(frozen=True)
class Meaning:
    """Places of user, item, rating and time among the names (-1: none), and for each role the candidates that tie."""

    places: tuple[int, int, int, int]
    ties: tuple[tuple[int, ...], ...]

    @property
    def known(self) -> int:
        """Roles that some name may have."""
        return sum(place >= 0 or bool(tie) for place, tie in zip(self.places, self.ties, strict=True))


def meaning_of(names: Sequence[str]) -> Meaning:
    """What the names say by themselves."""
    plain = [spellings(name) for name in names]
    found = [_of_role(role, plain) for role in ROLES]
    if not found[1]:
        users = frozenset().union(*RANKS["user_id"])
        found[1] = [
            place for place, name in enumerate(names)
            if _ENDS_IN_ID.search(re.sub(r":\w+$", "", name.strip()))
            and not {*plain[place]} & (users | _RECORD_IDS)
        ]  # fmt: skip
    places = tuple(candidates[0] if len(candidates) == 1 else -1 for candidates in found)
    ties = tuple(tuple(candidates) if len(candidates) > 1 else () for candidates in found)
    return Meaning(places, ties)  # type: ignore[arg-type]


def _of_role(role: str, plain: Sequence[tuple[str, ...]]) -> list[int]:
    """Places of the first rank of names that occurs; a whole name goes before the last part of one."""
    for rank in RANKS[role]:
        for part in (0, 1):
            found = [place for place, names in enumerate(plain) if len(names) > part and names[part] in rank]
            if found:
                return found
    return []


def clear_places(
    names: Sequence[str], shown: str, rows: Sequence[Sequence[str]] = (), *, pairs: bool = False
) -> tuple[int, int, int, int]:
    """The places of the four roles; DataError with what was seen where a needed one is not clear.

    A time is never needed: where two columns may be it, none is. ``pairs``: nor is a rating. ``rows``: what stands
    below the names, for the example in the sentence.
    """
    meaning = meaning_of(names)
    needed = 2 if pairs else 3
    unclear = [role for role in range(needed) if meaning.places[role] < 0]
    if pairs and meaning.ties[2]:
        unclear.append(2)
    if not unclear:
        return meaning.places
    for tie in (meaning.ties[role] for role in unclear):
        if len({names[place] for place in tie}) == 1:
            raise DataError(f"{shown} has {len(tie)} columns named '{names[tie[0]]}'; rename all but one, or give "
                            "positions from 0 with --columns.")  # fmt: skip
    tied = [" or ".join(f"'{names[place]}'" for place in meaning.ties[role]) for role in unclear]
    which = ", ".join(WORDS[role] + (f" ({tie})" if tie else "") for role, tie in zip(unclear, tied, strict=True))
    guess = guessed_columns(names, meaning, needed, rows)
    raise DataError(
        f"{shown} has the columns {named(names)}; their names do not say which is {which}. Say it with --columns "
        f"{'user,item[,rating]' if pairs else 'user,item,rating[,timestamp]'}"
        + (f", for example --columns {guess}." if guess else ".")
    )


def guessed_columns(names: Sequence[str], meaning: Meaning, needed: int, rows: Sequence[Sequence[str]]) -> str:
    """A value of ``--columns`` that keeps what is known and takes fitting columns for the rest; '' where too few."""
    places = [tie[0] if tie else place for place, tie in zip(meaning.places, meaning.ties, strict=True)]
    free = [place for place, name in enumerate(names) if place not in places and not is_index_name(name)]
    facts = [facts_of(column) for column in zip(*rows, strict=True)]
    times = [place for place in free if facts and facts[place].like_times]
    ratings = [place for place in free if facts and facts[place].like_ratings and place not in times]
    for role, fitting in ((2, ratings[-1:]), (3, times[-1:])):
        if needed > 2 and places[role] < 0 and fitting:
            places[role] = fitting[0]
    free = [place for place in free if place not in places]
    for role in range(needed):
        if places[role] < 0:
            if not free:
                return ""
            places[role] = free.pop(0)
    chosen = [place for place in places if place >= 0]
    texts = [names[place] for place in chosen]
    plain = all(re.fullmatch(r"[\w.:/-]+", text) for text in texts) and all(names.count(text) == 1 for text in texts)
    return ",".join(texts if plain else map(str, chosen))


def is_index_name(name: str) -> bool:
    """Whether a column only numbers the rows: what data frames and databases write beside the data."""
    return name.strip() in ("", "_id", "id", "#") or bool(
        re.fullmatch(r"(?i)unnamed: ?\d+|index|row(names?|_?id)", name)
    )


def named(names: Sequence[str]) -> str:
    """The names as a sentence shows them."""
    return ", ".join(f"'{name}'" for name in names[:12]) + (", ..." if len(names) > 12 else "")


def given_places(names: Sequence[str], columns: Sequence[str], shown: str) -> tuple[int, ...]:
    """The places of ``--columns`` (-1 where a name is empty) among names; UsageError where one is not there.

    Numbers are positions, unless the columns have numbers as names. A name is taken in another spelling where only one
    column has it.
    """
    if all(c.isdigit() and c not in names for c in columns if c):
        if max(int(c) for c in columns if c) >= len(names):
            raise UsageError(f"--columns {','.join(columns)}: {shown} has {len(names)} columns, counted from 0.")
        return tuple(int(c) if c else -1 for c in columns)
    return tuple(_place(names, c, shown) if c else -1 for c in columns)


def _place(names: Sequence[str], column: str, shown: str) -> int:
    exact = [place for place, name in enumerate(names) if name == column]
    alike = [place for place, name in enumerate(names) if spellings(name)[0] == spellings(column)[0]]
    found = exact or alike
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--columns {column}: {shown} has {len(found)} columns of this name; give positions from 0.")
    raise UsageError(f"--columns: {shown} has no column '{column}'; it has {named(names)}.")


def named_places(
    names: Sequence[str],
    columns: tuple[str, ...] | None,
    shown: str,
    values: Values,
    pairs: bool,
    rows: Sequence[Sequence[str]] = (),
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Places of the four roles among names, -1 where there is none, and notes of what was left out.

    ``columns``: what ``--columns`` says. ``values`` is asked where a name may stand for dates that nobody can read.
    """
    if columns:
        return (*given_places(names, columns, shown), -1)[:4], ()
    places = clear_places(names, shown, rows, pairs=pairs)
    tied = meaning_of(names).ties[3]
    if tied:
        which = " or ".join(f"'{names[place]}'" for place in tied)
        return places, (f"{shown}: the time may be {which}; none is read, unless --columns names one",)
    if places[3] >= 0 and not {*spellings(names[places[3]])} & RANKS["timestamp"][0]:
        texts = [text for text in values(names[places[3]]) if text.strip()]
        if sum(parse_time(text) is not None for text in texts) <= len(texts) / 2:
            example = f", such as {texts[0]!r}," if texts else ""
            note = (
                f"{shown}: the values of '{names[places[3]]}'{example} are no times that are known; they are left out"
            )
            return (*places[:3], -1), (note,)
    return places, ()


# Whether a row is a header ------------------------------------------------------------------------


def numbered(first: Sequence[str]) -> bool:
    """Whether a row is 0, 1, 2, ...: what is written for columns without names, an index column's empty name before."""
    names = [name.strip() for name in first]
    names = names[1:] if names and names[0] in ("", "Unnamed: 0") else names
    return len(names) > 1 and names == [str(k) for k in range(len(names))]


def is_header(first: Sequence[str], rest: Sequence[Sequence[str]], columns: Sequence[str] | None, pairs: bool) -> bool:
    """Whether the first row holds names: it cannot be data while the rows after it can, or its names are known.

    ``columns``: what ``--columns`` says. ``pairs``: there may be no column of numbers.
    """
    if numbered(first) and (len(first) > 2 or not pairs):
        return True
    by_name = columns and not all(c.isdigit() for c in columns if c)
    if by_name and {c for c in columns or () if c} <= set(first):
        return True
    if any(is_number(name) for name in first):
        return False
    sure = {"userid", "itemid"} & {spelling for name in first for spelling in spellings(name)}
    return meaning_of(first).known >= 2 or (pairs and bool(sure)) or _cannot_be_data(first, rest, pairs)


def _cannot_be_data(first: Sequence[str], rest: Sequence[Sequence[str]], pairs: bool) -> bool:
    """Whether a row without numbers stands above a column of numbers; of pairs, also above ids with digits alone."""
    columns = [[row[k] for row in rest if len(row) == len(first) and row[k].strip()] for k in range(len(first))]
    again = [name in values for name, values in zip(first, columns, strict=True) if name.strip()]
    if any(again) and not all(again):
        return False  # a row like the others, though damaged; one that comes again whole is the header of a joined file
    if any(first[k].strip() and _share(values, is_number) > 0.9 for k, values in enumerate(columns)):
        return True
    with_digits = all(_share(values, _has_digit) > 0.9 for values in columns)
    return pairs and with_digits and not any(_has_digit(name) for name in first)


def _share(values: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, values)) / len(values) if values else 0.0


def _has_digit(text: str) -> bool:
    return any(c.isdigit() for c in text)

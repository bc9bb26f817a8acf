"""Files from strangers: mutations of JSON and of bytes, and a folder that tells who has opened something in it."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IN_ACCESS, IN_OPEN, IN_NONBLOCK = 0x1, 0x20, 0o4000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**40, -0.5, 1e308, float("nan"), float("inf"), "", "x", "é\ud800",
    "a" * 5000, [], [[]], {}, {"": 0}, [1, 2, 3],
)  # fmt: skip
ELSEWHERE = ("../outside/{0}", "{1}/{0}", "train/../../outside/{0}", "./{0}", "train//{0}", "file://{1}/{0}", "\x00{0}")
"""Names of files that lie outside: {0} a name, {1} the absolute path of the folder outside."""


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """A list that holds, after the block, the files of ``folder`` that any process opened in it; Linux's inotify."""
    libc, opened = ctypes.CDLL(None, use_errno=True), list[str]()
    number = libc.inotify_init1(IN_NONBLOCK)
    assert number >= 0 and libc.inotify_add_watch(number, os.fsencode(folder), IN_OPEN | IN_ACCESS) >= 0
    try:
        yield opened
        with contextlib.suppress(BlockingIOError):
            while events := os.read(number, 1 << 16):
                while events:
                    length = int.from_bytes(events[12:16], "little")
                    name = events[16 : 16 + length].rstrip(b"\0").decode()
                    opened += [name] if name else []  # '' is the folder itself
                    events = events[16 + length :]
    finally:
        os.close(number)


def mutated(content: bytes, rng: random.Random, outside: Path) -> bytes:
    """``content`` with one to three changes: of its JSON where it is JSON, or of its bytes."""
    try:
        table = json.loads(content)
    except ValueError:
        table = None
    if table is None or rng.random() < 0.2:
        return _bytes(content, rng)
    table = copy.deepcopy(table)
    for _ in range(rng.randint(1, 3)):
        holder, key = _place(table, rng)
        _change(holder, key, rng, outside)
    return json.dumps(table).encode()


def _bytes(content: bytes, rng: random.Random) -> bytes:
    where, kind = rng.randrange(len(content) + 1), rng.randrange(5)
    if kind == 0:
        return content[:where]
    if kind == 1:
        return content[:where] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 9))) + content[where:]
    if kind == 2:
        return content[:where] + content[where + rng.randint(1, 40) :]
    if kind == 3:
        return rng.choice([b"", b"\0" * len(content), b"[" * 100_000, b"null", b"[]", b"\xff\xfe" + content])
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _place(table: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random holder in a tree and a key of it."""
    while True:
        key = rng.choice(list(table) if isinstance(table, dict) else range(len(table)))
        inner = table[key]
        if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.3:
            return table, key
        table = inner


def _change(holder: Any, key: Any, rng: random.Random, outside: Path) -> None:
    value = holder[key]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
        if not holder:  # the next change needs something to change
            holder.update({"x": 0}) if isinstance(holder, dict) else holder.append(0)
    elif kind == 1 and isinstance(value, str):
        name = rng.choice([os.path.basename(value) or "x", *os.listdir(outside)])
        holder[key] = rng.choice(ELSEWHERE).format(name, outside)
    elif kind == 2 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = value + rng.choice([-1, 1, 1000, -1e9])
    elif kind == 3 and isinstance(holder, list):
        holder.append(copy.deepcopy(value))
    elif kind == 4 and isinstance(holder, dict) and isinstance(key, str):
        holder[rng.choice([key + "x", "unknown", ""])] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))

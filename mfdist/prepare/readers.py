"""Sources to blocks of checked rows: pieces of a file, read in order, and parsed in any thread.

``FORMATS`` is the one place that says how each kind of layout is cut into pieces and parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfdist.prepare.delimited_rows import cut_delimited, head_bytes, parse_delimited
from mfdist.prepare.ids import hash_ids, plain_ids
from mfdist.prepare.json_records import document_pieces
from mfdist.prepare.json_rows import parse_document, parse_json_lines, parse_literal_lines
from mfdist.prepare.layout import Layout
from mfdist.prepare.row_checks import Block, Rules
from mfdist.prepare.sources import Source, Text
from mfdist.prepare.tables import parquet_batches, parse_table

CHUNK_BYTES = 4 << 20

Cut = Callable[[bytes, Layout, bool], int]


@dataclass(frozen=True)
class Format:
    """``pieces`` of a source in order, the last of them its fingerprint (str); ``parse`` makes one a block."""

    pieces: Callable[[Source, Layout], Iterator[Any]]
    parse: Callable[[Any, Layout, Rules], Block]


def chunks(source: Source, layout: Layout) -> Iterator[Any]:
    """Pieces of a source that :func:`parse` turns into blocks, in order; the last one is the fingerprint (str)."""
    return FORMATS[layout.kind].pieces(source, layout)


def parse(piece: Any, layout: Layout, rules: Rules) -> Block:
    """One piece as a block; runs in any thread."""
    block = FORMATS[layout.kind].parse(piece, layout, rules)
    for side in range(2):
        block.float_ids.append(int(plain_ids(block.content, block.start[side], block.length[side])))
        first, second = (np.empty(block.rating.size, np.uint64) for _ in range(2))
        hash_ids(block.content, block.start[side], block.length[side], np.uint64(rules.salt), first, second)
        block.hashes.append((first, second))
    return block


def _lines_end(content: bytes, _: Layout, __: bool) -> int:
    return content.rfind(b"\n") + 1


def _text_pieces(cut: Cut) -> Callable[[Source, Layout], Iterator[Any]]:
    """Pieces of a text: (whole records, bytes read so far from the packed file, how many of them are its head)."""

    def pieces(source: Source, layout: Layout) -> Iterator[Any]:
        with Text(source) as text:
            carried, first, final = b"", True, False
            while not final:
                more = text.read(CHUNK_BYTES)
                content = carried + more if carried else more
                final = not more
                if final and content and not content.endswith(b"\n"):
                    content += b"\n"
                if first and not final and len(content) < 4:
                    carried = content
                    continue
                if first and content.startswith(b"\xef\xbb\xbf"):
                    content = content[3:]
                head = head_bytes(content, layout, final) if first and layout.kind == "delimited" else 0
                end = cut(content, layout, final) if head >= 0 else 0
                if end:
                    yield content[:end], text.packed_place, head
                    first = False
                carried = content[end:]
            yield text.fingerprint

    return pieces


def _documents(source: Source, _: Layout) -> Iterator[Any]:
    with Text(source) as text:
        yield from document_pieces(text, source.shown, CHUNK_BYTES)
        yield text.fingerprint


FORMATS = {
    "delimited": Format(_text_pieces(cut_delimited), parse_delimited),
    "json": Format(_text_pieces(_lines_end), parse_json_lines),
    "json document": Format(_documents, parse_document),
    "python": Format(_text_pieces(_lines_end), parse_literal_lines),
    "parquet": Format(parquet_batches, parse_table),
}

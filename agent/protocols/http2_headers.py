"""Header blocks of HTTP/2 -> fields (HPACK, RFC 7541), also where earlier blocks were not seen.

In: complete header blocks of one direction, in order. Out: ``(name, value)`` pairs; what the block refers to and cannot
be known is None. Never happens: a wrong name or value for a conforming encoder, an exception other than
``ProtocolError``, growth beyond the bounds below.

The hpack library's own decoder cannot go on after a loss, and refuses what refers to an entry that it has not seen. So
its parts are used (the static table, the Huffman table, integers) around a dynamic table that may be incomplete. This
is sound because a table is a queue: the newest entry has the lowest index, and the oldest ones are evicted first. What
was inserted since the loss is therefore known exactly; an index beyond it refers to something older, which is unknown.
An entry that takes its name from an unknown one has a known value and no name, and its size is taken too small: then
this table keeps entries that the encoder has evicted already and will not refer to again. For the same reason it does
no harm to assume a larger table than there is, and a table that is cut at ``TABLE_BYTES`` only knows less.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Any

from hpack.exceptions import HPACKDecodingError
from hpack.hpack import decode_integer
from hpack.huffman_table import HUFFMAN_COMPLETE, HUFFMAN_EMIT_SYMBOL, HUFFMAN_FAIL, HUFFMAN_TABLE
from hpack.table import HeaderTable

from agent import redaction
from agent.errors import ProtocolError
from agent.protocols.http1_memo import Memo
from agent.protocols.http1_stream import StreamLosses

DEFAULT_TABLE_BYTES = 4096
"""RFC 9113 section 6.5.2: the size of a table before anything else is agreed."""
TABLE_BYTES = 16 * 1024
"""So much of a dynamic table is kept; older entries of larger tables are unknown, and "table_too_large" counts them."""
LIST_BYTES = 64 * 1024
"""Size of a decoded list as RFC 7541 section 4.1 counts it. Fields beyond it are left out: "list_too_long"."""
BLOCK_REPEATS = 64
"""Blocks per direction of which it is remembered what they are, while the table does not change."""
MEMO_STRINGS = 4096

Field = tuple[bytes | None, bytes | None]
UNKNOWN: Field = (None, None)

_STATIC_FIELDS = len(HeaderTable.STATIC_TABLE)
_FIRST_DYNAMIC = _STATIC_FIELDS + 1
# The first byte of an indexed field -> the field; 0x80, index 0, is no key: RFC 7541 section 6.1 forbids it.
_STATIC: dict[int, Field] = {0x80 + index: field for index, field in enumerate(HeaderTable.STATIC_TABLE, 1)}
_STATIC_NAMES = (b"", *(name for name, _ in HeaderTable.STATIC_TABLE))
_FIRST_DYNAMIC_BYTE = 0x80 + _FIRST_DYNAMIC
_NO_LIMIT = (1 << 32) - 1


class _HuffmanNode(dict[int, "tuple[_HuffmanNode, bytes]"]):
    """A node of the library's table: byte -> (next node, symbols), two of its steps, which go by four bits, in one.

    Filled as needed, with 256 entries in each of 256 nodes at most.
    """

    __slots__ = ("may_end", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.may_end = False

    def __missing__(self, byte: int) -> tuple[_HuffmanNode, bytes]:
        number, symbols, flags = self.number, b"", 0
        for nibble in (byte >> 4, byte & 15):
            number, flags, symbol = HUFFMAN_TABLE[number * 16 + nibble]
            if flags & HUFFMAN_FAIL:
                raise ProtocolError("malformed")
            if flags & HUFFMAN_EMIT_SYMBOL:
                symbols += bytes((symbol,))
        node = _HUFFMAN_NODES[number]
        node.may_end = bool(flags & HUFFMAN_COMPLETE)  # the same by whatever way a node is reached
        step = self[byte] = node, symbols
        return step


_HUFFMAN_NODES = [_HuffmanNode(number) for number in range(256)]
_HUFFMAN_ROOT = _HUFFMAN_NODES[0]
_HUFFMAN_ROOT.may_end = True


def decode_huffman(coded: bytes) -> bytes:
    """Decode a Huffman-coded string (RFC 7541 section 5.2). Raises ProtocolError: malformed."""
    node = _HUFFMAN_ROOT
    decoded = []
    for byte in coded:
        node, symbols = node[byte]
        decoded.append(symbols)
    if not node.may_end:
        raise ProtocolError("malformed")
    return b"".join(decoded)


class HuffmanMemo:
    """Decoded strings by their coded form, for all connections. Values of ``unique`` and secret names are not kept."""

    __slots__ = ("_kept_names", "_values", "names")

    def __init__(self, unique: frozenset[bytes]) -> None:
        self.names = Memo(decode_huffman, MEMO_STRINGS)
        self._values = Memo(decode_huffman, MEMO_STRINGS)
        self._kept_names = Memo(
            lambda name: name not in unique and not redaction.is_secret_header(name.decode("latin-1")), MEMO_STRINGS
        )

    def value(self, name: bytes | None, coded: bytes) -> bytes:
        """Decode the value of a field called ``name``; a field without a known name may be a secret."""
        if name is not None and self._kept_names[name]:
            return self._values[coded]
        return decode_huffman(coded)


class HeaderDecoder:
    """The HPACK context of one direction.

    ``changes`` grows with each change of the table. ``repeats`` is for the owner, who may remember by a block's hash
    what was made of it when the block itself changed nothing; a change of the table empties it.
    """

    __slots__ = ("_allowed", "_bytes", "_entries", "_huffman", "_limit", "_losses", "_max_bytes", "changes", "repeats")
    MOST_REPEATS = BLOCK_REPEATS

    def __init__(self, huffman: HuffmanMemo, losses: StreamLosses) -> None:
        self._huffman = huffman
        self._losses = losses
        self._entries: deque[Field] = deque()  # the newest first
        self._bytes = 0
        self._max_bytes = TABLE_BYTES
        self._limit = _NO_LIMIT
        self._allowed = 0
        self.changes = 0
        self.repeats: dict[int, Any] = {}

    @property
    def table_bytes(self) -> int:
        """The size of what is kept, where names are unknown a lower bound."""
        return self._bytes

    def begin(self) -> None:
        """The connection's beginning was seen: the first block meets an empty table of the default size."""
        if not self.changes:
            self._max_bytes = DEFAULT_TABLE_BYTES
            self._limit = max(DEFAULT_TABLE_BYTES, self._allowed)

    def forget(self) -> None:
        """Blocks were missed: what the table holds, and how large it is, is unknown."""
        self._entries.clear()
        self._bytes = 0
        self._max_bytes = TABLE_BYTES
        self._limit = _NO_LIMIT
        self._changed()

    def allow(self, table_bytes: int | None) -> None:
        """The other end's SETTINGS_HEADER_TABLE_SIZE, None when it was missed.

        A lower limit is in force when the encoder has acknowledged it, and it says so in its next block itself (RFC
        7541 section 4.2): only a higher one matters here.
        """
        if table_bytes is None:
            self._limit = self._allowed = _NO_LIMIT
        else:
            self._allowed = max(self._allowed, table_bytes)  # the first may come before the connection preface
            self._limit = max(self._limit, table_bytes)

    def decode(self, block: bytes) -> list[Field]:
        """Return the fields of a block. Raises ProtocolError: malformed; then the table is unknown."""
        before = self.changes
        try:
            fields = self._decode(block)
        except (IndexError, KeyError, ProtocolError, HPACKDecodingError):
            self.forget()
            raise ProtocolError("malformed") from None
        # A quick upper bound first: what is indexed is as large as the table at most, and Huffman codes have 5 bits.
        indexed_bytes = self._bytes if self.changes == before else self._max_bytes
        if len(fields) * (indexed_bytes + 96) + 2 * len(block) > LIST_BYTES:
            return self._bounded(fields)
        return fields

    def _decode(self, block: bytes) -> list[Field]:
        fields: list[Field] = []
        entries = self._entries
        known = len(entries)
        huffman_value = self._huffman.value
        position, end = 0, len(block)
        while position < end:
            byte = block[position]
            if byte >= 0x80:
                if byte < _FIRST_DYNAMIC_BYTE:
                    position += 1
                    fields.append(_STATIC[byte])
                    continue
                if byte != 0xFF:
                    position += 1
                    index = byte - _FIRST_DYNAMIC_BYTE
                else:
                    index, position = _integer(block, position, 7)
                    index -= _FIRST_DYNAMIC
                fields.append(entries[index] if index < known else UNKNOWN)
                continue
            if byte & 0x40:
                mask, bits = 0x3F, 6
            elif byte & 0x20:
                if fields:  # section 4.2: only at the beginning of a block
                    raise ProtocolError("malformed")
                size, position = _integer(block, position, 5)
                self._resize(size)
                known = len(entries)
                continue
            else:
                mask, bits = 0x0F, 4
            index = byte & mask
            if index == mask:
                index, position = _integer(block, position, bits)
            else:
                position += 1
            name: bytes | None
            if index > _STATIC_FIELDS:
                index -= _FIRST_DYNAMIC
                name = entries[index][0] if index < known else None
            elif index:
                name = _STATIC_NAMES[index]
            else:
                coded, is_huffman, position = _string(block, position)
                name = self._huffman.names[coded] if is_huffman else coded
            coded, is_huffman, position = _string(block, position)
            field = (name, huffman_value(name, coded) if is_huffman else coded)
            fields.append(field)
            if byte & 0x40:
                self._insert(field)
                known = len(entries)
        return fields

    def _insert(self, field: Field) -> None:
        size = _size(field)
        entries = self._entries
        self._bytes += size
        entries.appendleft(field)
        # Section 4.4: an entry that is larger than the table empties it, and is not kept either.
        while self._bytes > self._max_bytes:
            self._bytes -= _size(entries.pop())
        self._changed()

    def _resize(self, size: int) -> None:
        if size > self._limit:
            raise ProtocolError("malformed")
        if size > TABLE_BYTES:
            self._losses.count("table_too_large")
        self._max_bytes = min(size, TABLE_BYTES)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._entries.pop())
        self._changed()

    def _changed(self) -> None:
        self.changes += 1
        if self.repeats:
            self.repeats.clear()

    def _bounded(self, fields: list[Field]) -> list[Field]:
        size = 32 * len(fields) + sum(map(len, filter(None, chain.from_iterable(fields))))
        if size <= LIST_BYTES:
            return fields
        self._losses.count("list_too_long")
        size = 0
        for number, field in enumerate(fields):
            size += _size(field)
            if size > LIST_BYTES:
                return fields[:number]
        return fields


def _size(field: Field) -> int:
    name, value = field
    return 32 + len(name or b"") + len(value or b"")


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    """Return an integer (RFC 7541 section 5.1) and the position behind it."""
    value, consumed = decode_integer(block[position : position + 8], bits)
    return value, position + consumed


def _string(block: bytes, position: int) -> tuple[bytes, int, int]:
    """Return a string as it is coded (section 5.2), whether that is Huffman, and the position behind it."""
    byte = block[position]
    length = byte & 0x7F
    if length == 0x7F:
        length, position = _integer(block, position, 7)
    else:
        position += 1
    end = position + length
    if end > len(block):
        raise ProtocolError("malformed")
    return block[position:end], byte & 0x80, end

"""What the columns of a parquet file claim to unpack to, told from the headers of their pages.

Reads thrift's compact protocol, as the formats parquet-format and thrift-compact-protocol say. Arrow tells this neither
before it has taken the memory nor without ending the process where a footer is damaged.
"""

import mmap
from typing import Any

MAGIC = b"PAR1"
# The numbers of fields in parquet.thrift.
ROW_GROUPS, COLUMNS, META = 4, 1, 3
PATH, COMPRESSED, DATA, DICTIONARY = 3, 7, 9, 11
PAGE_UNPACKED, PAGE_PACKED = 2, 3

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _MAP, _STRUCT = 1, 2, 3, 7, 8, 11, 12
_INTEGERS, _LISTS = (4, 5, 6), (9, 10)
_DEPTH, _HEADER = 16, 1 << 16  # levels, and values that a page's header may have


def largest(mapped: mmap.mmap, wanted: list[str]) -> int:
    """The most bytes to which one chunk of a wanted column claims to unpack. Raises ValueError for a damaged file."""
    length = int.from_bytes(mapped[-8:-4], "little")
    if mapped[-4:] != MAGIC or not 0 < length <= len(mapped) - 12:
        raise ValueError("no footer at its end")
    footer = _Reader(mapped, len(mapped) - 8 - length, length).struct()
    most = 0
    try:
        for column in [column[META] for group in footer[ROW_GROUPS] for column in group[COLUMNS]]:
            if column[PATH][0].decode("utf-8", "replace") in wanted:
                start = min(offset for offset in (column[DATA], column.get(DICTIONARY, 0)) if offset > 0)
                most = max(most, _unpacked(mapped, start, start + column[COMPRESSED]))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged footer ({type(error).__name__}: {error})") from None
    return most


def _unpacked(mapped: mmap.mmap, start: int, stop: int) -> int:
    """The bytes to which the pages between two places of a file claim to unpack."""
    if not 0 < start <= stop <= len(mapped):
        raise ValueError("a column ends behind the end of the file")
    total, at = 0, start
    while at < stop:
        reader = _Reader(mapped, at, _HEADER)
        header = reader.struct()
        if header[PAGE_UNPACKED] < 0 or header[PAGE_PACKED] < 0:
            raise ValueError(f"the page at byte {at} has no size")
        total += header[PAGE_UNPACKED]
        at = reader.at + header[PAGE_PACKED]
    return total


class _Reader:
    """Reads from byte `at` on, at most so many values."""

    def __init__(self, mapped: mmap.mmap, at: int, values: int):
        self.mapped, self.at, self.left = mapped, at, values

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """{number of a field: value}"""
        fields, number = {}, 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else _signed(self._number())
            kind = byte & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _byte(self) -> int:
        if self.at >= len(self.mapped):
            raise ValueError("a header ends behind the end of the file")
        self.at += 1
        return self.mapped[self.at - 1]

    def _number(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
        raise ValueError("a number without end")

    def _value(self, kind: int, depth: int) -> Any:
        self.left -= 1
        if depth > _DEPTH or self.left < 0:
            raise ValueError("a header without end")
        if kind in _INTEGERS:
            return _signed(self._number())
        if kind in (_TRUE, _FALSE, _BYTE):  # a mere flag takes a byte in a list
            return self._byte()
        if kind in (_DOUBLE, _BINARY):
            length = 8 if kind == _DOUBLE else self._number()
            self.at += length
            return self.mapped[self.at - length : self.at]
        if kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._number()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _MAP:
            count = self._number()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4, depth + 1), self._value(kinds & 15, depth + 1)) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError("an unknown type of value")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)

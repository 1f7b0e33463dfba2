"""What the pages of a parquet file claim to unpack to, told from their headers (parquet-format's thrift, compact)."""

import mmap

_LENGTHS = {1: 0, 2: 0, 3: 1, 7: 8}  # of true, false, a byte, a double
_INTEGERS, _BINARY, _LISTS, _MAP, _STRUCT = (4, 5, 6), 8, (9, 10), 11, 12
_DEPTH, _FIELDS = 8, 10_000


def unpacked(mapped: mmap.mmap, start: int, stop: int) -> int:
    """The bytes to which the pages between two places of a file claim to unpack. Raises ValueError for damaged ones."""
    total, at = 0, start
    while at < stop:
        header = _Header(mapped, at)
        size, packed = (header.fields.get(field, -1) for field in (2, 3))
        if size < 0 or packed < 0:
            raise ValueError(f"the page at byte {at} has no size")
        total += size
        at = header.at + packed
    return total


class _Header:
    """The whole numbers of a struct by their fields' numbers; `at`: where it ends."""

    def __init__(self, mapped: mmap.mmap, at: int):
        self.mapped, self.at, self.fields, self.left = mapped, at, {}, _FIELDS
        try:
            self._struct(self.fields, 0)
        except IndexError:
            raise ValueError("a page's header ends behind the end of the file") from None

    def _byte(self) -> int:
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
        raise ValueError("a number without end in a page's header")

    def _struct(self, fields: dict[int, int], depth: int) -> None:
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else _signed(self._number())
            value = self._value(byte & 15, depth)
            if value is not None:
                fields[number] = value

    def _value(self, kind: int, depth: int) -> int | None:
        """Reads one value, and returns it where it is a whole number."""
        self.left -= 1
        if depth > _DEPTH or self.left < 0:
            raise ValueError("a page's header without end")
        if kind in _INTEGERS:
            return _signed(self._number())
        if kind in _LENGTHS:
            self.at += _LENGTHS[kind]
        elif kind == _BINARY:
            length = self._number()  # which moves `at` itself
            self.at += length
        elif kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._number()
            for _ in range(count):
                # What is a mere flag as a field takes a byte in a list.
                self._value(max(head & 15, 3), depth + 1)
        elif kind == _MAP:
            count = self._number()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._value(kinds >> 4, depth + 1)
                self._value(kinds & 15, depth + 1)
        elif kind == _STRUCT:
            self._struct({}, depth + 1)
        else:
            raise ValueError("an unknown type in a page's header")
        return None


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)

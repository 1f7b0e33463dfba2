"""Ways to damage a file: its bytes, its numbers, and the parts that its format has, put together soundly again."""

import copy
import gzip
import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random

Mutation = Callable[[bytes, Random], bytes]

EXTREME = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
EXTREME += (2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = ("", "\0", "\n", "a\nb", "../x", "/etc/passwd", "x" * 3000, "é\u202e\ud800", "nan", "-1", "__class__", "1e999")
ODD = (None, True, False, -1, 0, 1.5, 1e308, float("nan"), float("inf"), 10**30, "@HUGE@", [], {}, [[]], {"": None})
DEEP = 100_000


# ---- bytes


def flip(data: bytes, rng: Random) -> bytes:
    """A few bytes become others."""
    out = bytearray(data)
    for _ in range(min(len(out), rng.choice((1, 1, 2, 4, 16)))):
        out[rng.randrange(len(out))] ^= rng.choice((1, 2, 4, 8, 16, 32, 64, 128, 255, rng.randrange(1, 256)))
    return bytes(out)


def number(data: bytes, rng: Random) -> bytes:
    """A binary number becomes an extreme one, or one near what it was."""
    width, order = rng.choice((1, 2, 4, 4, 8, 8)), rng.choice("<>")
    if len(data) < width:
        return data
    at, kind = rng.randrange(len(data) - width + 1), order + {1: "B", 2: "H", 4: "I", 8: "Q"}[width]
    (old,) = struct.unpack_from(kind, data, at)
    new = rng.choice((rng.choice(EXTREME), old + rng.randrange(-9, 10), old * 2, ~old))
    return data[:at] + struct.pack(kind, new % 256**width) + data[at + width :]


def digits(data: bytes, rng: Random) -> bytes:
    """A number written in digits becomes another."""
    found = list(re.finditer(rb"-?\d+", data[: 1 << 16]))
    if not found:
        return data
    where = rng.choice(found)
    new = rng.choice((*map(str, EXTREME), "-1", "1e9", "1.5", "9" * 5000, "0x10", "1" * 30)).encode()
    return data[: where.start()] + new + data[where.end() :]


def cut(data: bytes, rng: Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data) + 1)]


def remove(data: bytes, rng: Random) -> bytes:
    """Some bytes within are missing."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 1, 2, 4, 8, 64, 1000)) :]


def repeat(data: bytes, rng: Random) -> bytes:
    """Some bytes stand there again, here or elsewhere, once or many times."""
    at, to = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    piece = data[at : at + rng.choice((1, 2, 4, 8, 32, 256))]
    return data[:to] + piece * rng.choice((1, 1, 2, 10, 500)) + data[to:]


def insert(data: bytes, rng: Random) -> bytes:
    """Bytes that do not belong there."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 2, 4, 8, 100))), bytes(8), b"\xff" * 8)) + data[at:]


BYTES = (flip, flip, number, number, cut, remove, repeat, insert, digits)


def some(data: bytes, rng: Random, ways: tuple[Mutation, ...]) -> bytes:
    """One or several mutations, one after another."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(ways)(data, rng)
    return data


def near_ends(data: bytes, rng: Random) -> bytes:
    """Only the first or the last kilobyte suffers: most formats have there what tells of the rest."""
    if rng.random() < 0.5:
        return some(data[:1024], rng, BYTES) + data[1024:]
    return data[:-1024] + some(data[-1024:], rng, BYTES)


# ---- text


def text(data: bytes, rng: Random) -> bytes:
    """Words and lines are exchanged, repeated, lost."""
    parts = re.split(r"([\s,()=\[\]{}\"':]+)", data.decode("utf-8", "replace"))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(parts))
        way = rng.randrange(5)
        if way == 0:
            parts[at] = rng.choice(WORDS)
        elif way == 1:
            parts[at] = rng.choice(parts)
        elif way == 2:
            parts[at] *= rng.choice((0, 2, 50))
        elif way == 3:
            parts[at] = rng.choice(("(", ")", "(" * 300, "[" * 5000, "-" * 20000, "**x", "*x", "lambda: 0", "\0", "\\"))
        else:
            parts[at] = str(rng.choice(EXTREME))
    return "".join(parts).encode("utf-8", "surrogatepass")


def deep(data: bytes, rng: Random) -> bytes:
    """JSON, so deep that a reader which descends runs out of stack."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    core = "1" if opening != "[" else ""
    where = data.find(b":") + 1 if rng.random() < 0.5 else 0
    nested = (opening * DEEP + core + closing * rng.choice((DEEP, 0))).encode()
    return data[:where] + nested + data[where:] if where else nested


def tree(data: bytes, rng: Random) -> bytes:
    """A value somewhere in JSON becomes another, goes, or gets another name; other data: text."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return text(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(content))
        if not places:
            break
        holder, key = rng.choice(places)
        way = rng.randrange(6)
        if way == 0 and isinstance(holder, dict):
            holder[rng.choice(WORDS)] = holder.pop(key)
        elif way == 1:
            del holder[key]
        elif way == 2:
            holder[key] = rng.choice(EXTREME)
        elif way == 3:
            other, its = rng.choice(places)
            if its in other if isinstance(other, dict) else its < len(other):
                holder[key] = copy.deepcopy(other[its])
        elif way == 4:
            holder[key] = rng.choice(WORDS)
        else:
            holder[key] = rng.choice(ODD)
    return _dumped(content).encode("utf-8", "surrogatepass")


def _dumped(content) -> str:
    # Python itself writes no number of so many digits.
    return json.dumps(content).replace('"@HUGE@"', "9" * 5000)


def _places(content):
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


TEXT = (text, text, flip, cut, digits, remove, repeat)
JSON = (tree, tree, tree, text, flip, cut, digits)


# ---- containers: what is inside suffers, the container stays sound


def zipped(inner: Callable[[str], tuple[Mutation, ...]]) -> Mutation:
    """A member of a zip archive is mutated, lost, renamed, doubled or stored in another way; checksums are right."""

    def mutate(data: bytes, rng: Random) -> bytes:
        try:
            held = members(data)
        except Exception:
            return flip(data, rng)
        if not held:
            return flip(data, rng)
        at, way = rng.randrange(len(held)), rng.randrange(10)
        name, content, kind = held[at]
        if way == 0:
            del held[at]
        elif way == 1:
            held[at] = (rng.choice((name + "x", "../" + name, held[0][0], "data.pkl", "é.npy")), content, kind)
        elif way == 2:
            held[at] = (name, content, rng.choice((0, 8, 12, 14)))
        elif way == 3:
            held.append(held[at])
        elif way == 4:
            held[at] = (name, bytes(1 << 22), 8)
        else:
            held[at] = (name, some(content, rng, inner(name)), kind)
        return archived(held)

    return mutate


def archived(members: list[tuple[str, bytes, int]]) -> bytes:
    """A zip archive of (name, content, compression), without the time, so that it is the same each time."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(out, "w") as archive:
            for name, content, kind in members:
                archive.writestr(zipfile.ZipInfo(name), content, kind)
    return out.getvalue()


def members(data: bytes) -> list[tuple[str, bytes, int]]:
    """The inverse of `archived`."""
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return [(info.filename, opened.read(info), info.compress_type) for info in opened.infolist()]


def gzipped(inner: tuple[Mutation, ...]) -> Mutation:
    """What is in a gzip file is mutated."""

    def mutate(data: bytes, rng: Random) -> bytes:
        try:
            content = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return flip(data, rng)
        if rng.random() < 0.01:
            content += b"x" * (1 << 24)
        return gzip.compress(some(content, rng, inner), 1, mtime=0)

    return mutate


def headed(data: bytes, rng: Random) -> bytes:
    """The JSON header of a safetensors file is mutated, and its length told rightly, mostly."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data):
        return flip(data, rng)
    header = tree(data[8 : 8 + length], rng)
    told = len(header) if rng.random() < 0.95 else rng.choice(EXTREME) % 2**64
    return told.to_bytes(8, "little") + header + data[8 + length :]


def npy(data: bytes, rng: Random) -> bytes:
    """The header of a .npy member is mutated, and its length told rightly, mostly."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        return flip(data, rng)
    start = 10 if data[6] == 1 else 12
    length = int.from_bytes(data[8:start], "little")
    header = some(data[start : start + length], rng, (text, digits, flip))
    told = len(header) if rng.random() < 0.9 else rng.choice(EXTREME)
    return data[:8] + (told % 256 ** (start - 8)).to_bytes(start - 8, "little") + header + data[start + length :]


def png(data: bytes, rng: Random) -> bytes:
    """A chunk of a PNG is mutated, moved, doubled or lost; its checksum is right."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return flip(data, rng)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    place = rng.randrange(min(len(chunks), rng.choice((1, 1, 8))))
    kind, body = chunks[place]
    way = rng.randrange(8)
    if way == 0:
        del chunks[place]
    elif way == 1:
        chunks.insert(rng.randrange(len(chunks)), chunks[place])
    elif way == 2:
        chunks[place] = (rng.choice((b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"acTL")), body)
    elif way == 3:
        chunks.insert(1, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24))))
    else:
        chunks[place] = (kind, some(body, rng, BYTES))
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return data[:8] + b"".join(parts)

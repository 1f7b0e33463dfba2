"""Members of zip archives, found in a memory map of the archive."""

import mmap
import struct
import zipfile
import zlib


def stored(mapped: mmap.mmap, info: zipfile.ZipInfo, writer: str) -> slice:
    """Where the bytes of an uncompressed member lie in the file; its checksum is verified.

    Raises ValueError for any other member (`writer` is who would not write such a one) and for a false place.
    """
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"{info.filename} is compressed or encrypted, which {writer} does not do")
    start = info.header_offset
    if mapped[start : start + 4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not where the archive says")
    name_length, extra_length = struct.unpack("<HH", mapped[start + 26 : start + 30])
    start += 30 + name_length + extra_length
    stop = start + info.file_size
    if not 0 <= start <= stop <= len(mapped):
        raise ValueError(f"{info.filename} ends behind the end of the file")
    # PyTorch writes 0 when told to leave checksums out.
    if info.CRC and zlib.crc32(memoryview(mapped)[start:stop]) != info.CRC:
        raise ValueError(f"{info.filename} has another checksum than the archive says")
    return slice(start, stop)

"""Small files that claim terabytes, and bombs that would unpack to gigabytes; no reader may believe them."""

import gzip
import io
import json
import struct
import zipfile
import zlib

import numpy as np
from target import Case, saved

TB = 1 << 40


def safetensors() -> dict[str, Case]:
    def file(shape, offsets, told=None):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        return {"w.safetensors": (told or len(header)).to_bytes(8, "little") + header + bytes(8)}

    return {
        "a shape of terabytes": file([TB], [0, 4 * TB]),
        "a shape of another size than its bytes": file([TB], [0, 8]),
        "a header of terabytes": file([2], [0, 8], TB),
        "a header of the greatest length": file([2], [0, 8], 2**64 - 1),
        "no numbers of endless length": file([0, 2**62], [0, 0]),
        "a hundred dimensions": file([1] * 99 + [2], [0, 8]),
    }


def _npy(shape, data=b"", version=1, told=None) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    width = 2 if version == 1 else 4
    length = len(header) if told is None else told
    return b"\x93NUMPY" + bytes([version, 0]) + length.to_bytes(width, "little") + header + data


def npz() -> dict[str, Case]:
    def file(member, kind=zipfile.ZIP_STORED, size=None):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", kind) as archive:
            archive.writestr("a.npy", member)
        data = bytearray(out.getvalue())
        if size is not None:
            where = data.rindex(b"PK\x01\x02") + 24
            data[where : where + 4] = size.to_bytes(4, "little")
        return {"w.npz": bytes(data)}

    found = {}
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        found |= {
            f"a shape of terabytes, {kind}": file(_npy(f"({TB},)", bytes(8)), kind),
            f"a header of gigabytes, {kind}": file(_npy("(2,)", bytes(8), 2, 2**32 - 1), kind),
            f"no numbers of endless length, {kind}": file(_npy(f"(0, {2**62}, {2**62})"), kind),
        }
    whole = _npy("(1000000000,)", bytes(64))
    return found | {
        "a directory that claims gigabytes": file(whole, zipfile.ZIP_DEFLATED, 2**32 - 2),
        "a bomb whose header is another": file(_npy("(3,)", bytes(1 << 27)), zipfile.ZIP_DEFLATED),
        "LZMA": file(_npy("(2,)", bytes(8)), zipfile.ZIP_LZMA),
        "bzip2, which packs 45 MB in 40 bytes": file(_npy("(2,)", bytes(1 << 24)), zipfile.ZIP_BZIP2),
    }


def pth() -> dict[str, Case]:
    import pth_writer as writer

    def rebuilt(numel, shape, stride):
        return (
            b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
            b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + _long(numel) + b"tQK\x00" + _long(shape) + b"\x85" + _long(stride) + b"\x85\x89}tRs."
        )  # fmt: skip

    def _long(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    magic = writer.pickle.dumps(writer.MAGIC, 2)
    programs = {
        "a storage of terabytes": rebuilt(TB, 2, 1),
        "a tensor of terabytes": rebuilt(2, TB, 1),
        "a tensor that repeats one number": rebuilt(2, TB, 0),
        "a text of exabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "bytes of gigabytes": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"a.",
        "a number of gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
        "the four billionth place of the memo": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b"0N.",
        "a frame of exabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    }
    found = {}
    for name, program in programs.items():
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/data/0", bytes(8))
        found[f"{name}, zip"] = {"w.pth": out.getvalue()}
        found[f"{name}, old"] = {"w.pth": magic + b"\x80\x02M\xe9\x03.\x80\x02}." + program + bytes(64)}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 27))
    return found | {"a bomb": {"w.pth": out.getvalue()}}


def hdf5() -> dict[str, Case]:
    import h5py

    def filled(chunks):
        def write(path):
            with h5py.File(path, "w") as file:
                file.create_dataset("a", (1 << 20, 1 << 20), "f4", chunks=chunks)

        return saved(write)

    def contiguous(path):
        with h5py.File(path, "w") as file:
            file["a"] = np.arange(9973 % 256 + 9973, dtype=np.uint8)

    def chunked(path):
        with h5py.File(path, "w") as file:
            file.create_dataset("a", data=np.ones(4, "u1"), chunks=(4219,), maxshape=(None,), compression="gzip")

    def packed_twice(path):
        with h5py.File(path, "w") as file:
            made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            made.set_chunk((1 << 22,))
            made.set_deflate(9)
            made.set_deflate(9)
            space = h5py.h5s.create_simple((1 << 22,))
            h5py.h5d.create(file.id, b"a", h5py.h5t.NATIVE_UINT8, space, made).write(
                space, space, np.zeros(1 << 22, "u1")
            )

    size = struct.pack("<Q", 9973 % 256 + 9973)
    lied = saved(contiguous).replace(size, struct.pack("<Q", TB))
    files = {
        "a fill value, terabytes of it": filled(None),
        "a fill value in chunks": filled((1024, 1024)),
        "a size of terabytes": lied,
        "a chunk of gigabytes": saved(chunked).replace(struct.pack("<II", 4219, 1), struct.pack("<II", 2**31, 1)),
        "packed twice": saved(packed_twice),
    }
    return {name: {"w.h5": data} for name, data in files.items()}


def tfjs() -> dict[str, Case]:
    def file(shape, dtype="float32"):
        weights = [{"name": "a", "shape": shape, "dtype": dtype}]
        content = {"weightsManifest": [{"paths": ["s"], "weights": weights}]}
        return {"model.json": json.dumps(content).encode(), "s": bytes(8)}

    numbers = {"model.json": b'{"weightsManifest": [{"paths": ["s"], "weights": [{"name": "a", "shape": [' + b"9" * 4000
               + b"], \"dtype\": \"float32\"}]}]}", "s": bytes(8)}  # fmt: skip
    return {
        "a shape of terabytes": file([TB]),
        "no numbers of endless length": file([0, 2**62, 2**62]),
        "a thousand dimensions": file([2] * 1000),
        "a number of four thousand digits": numbers,
    }


def images() -> dict[str, Case]:
    from fuzz_data import encoded, photo

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def png(width, height, data):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    jpeg = encoded(photo(), "JPEG")
    at = jpeg.index(b"\xff\xc0")
    webp = encoded(photo(), "WEBP", lossless=True)
    of_webp = webp.index(b"VP8L") + 9
    tiff, bmp = encoded(photo(), "TIFF"), encoded(photo(), "BMP")
    width, height = photo().size
    for tag, old in ((256, width), (257, height)):
        for kind, form in ((3, "<HHIHH"), (4, "<HHII")):
            entry = struct.pack(form, tag, kind, 1, old, *([0] if kind == 3 else []))
            tiff = tiff.replace(entry, struct.pack("<HHII", tag, 4, 1, 100_000))
    files = {
        "PNG": png(60_000, 60_000, zlib.compress(bytes(100))),
        "PNG, within what PIL takes": png(13_000, 13_000, zlib.compress(bytes(100))),
        "PNG, one row": png(2**31 - 1, 1, zlib.compress(bytes(100))),
        "PNG, a bomb": png(13_000, 13_000, zlib.compress(bytes(1 << 16), 9) * 2),
        "JPEG": jpeg[: at + 5] + b"\xff\xff\xff\xff" + jpeg[at + 9 :],
        "JPEG, within what PIL takes": jpeg[: at + 5] + struct.pack(">HH", 12_000, 12_000) + jpeg[at + 9 :],
        "GIF": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
        "BMP": bmp[:18] + struct.pack("<ii", 100_000, 100_000) + bmp[26:],
        "PPM": b"P6 100000 100000 255\n" + bytes(100),
        "WEBP": webp[:of_webp] + b"\xff\xff\xff\x0f" + webp[of_webp + 4 :],
        "TIFF": tiff,
    }
    return {name: {"photo": data} for name, data in files.items()}


def parquet() -> dict[str, Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fuzz_data import encoded, photo

    def file(images, **options):
        labels = ["a", "b"] * (len(images) // 2)
        table = pa.table({"image": images, "label": labels})
        return {"data.parquet": saved(lambda path: pq.write_table(table, path, store_schema=False, **options))}

    one = np.random.default_rng(0).bytes(1 << 16)
    often = pa.DictionaryArray.from_arrays(pa.array(np.zeros(60_000, np.int32)), pa.array([one, b""]))
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array([encoded(photo(), "PNG")]))
    return {
        "one value sixty thousand times": file(often),
        "two million rows": file(rows),
        "zeros": file([bytes(1 << 27), b""], compression="zstd", use_dictionary=False),
    }


def tokenizer() -> dict[str, Case]:
    huge = b"#version\n" + b"a b " * (1 << 26)
    return {"a list of merges that is a bomb": {"bpe_simple_vocab_16e6.txt.gz": gzip.compress(huge, 6, mtime=0)}}

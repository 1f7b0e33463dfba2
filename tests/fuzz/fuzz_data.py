"""Readers of data: images, parquet files, packages of npm."""

import io
import json
import tarfile
from pathlib import Path

import lies
import mutations as m
import numpy as np
from target import MB, Case, Target, only, saved


def photo(size=(24, 20)):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _images() -> list[Case]:
    from PIL import Image

    picture, exif = photo(), Image.Exif()
    exif[0x0112] = 6
    cases = [encoded(picture, kind) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")]
    cases += [encoded(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    cases.append(encoded(picture, "JPEG", progressive=True, quality=50))
    cases.append(encoded(picture.convert("CMYK"), "JPEG"))
    cases.append(encoded(picture.convert("P"), "PNG"))
    cases.append(encoded(picture.convert("LA"), "PNG"))
    cases.append(encoded(picture.convert("L").convert("I;16"), "PNG"))
    cases.append(encoded(picture.convert("1"), "TIFF", compression="group4"))
    cases.append(encoded(picture, "TIFF", compression="tiff_lzw"))
    cases.append(encoded(picture, "WEBP", lossless=True))
    for kind in ("JPEG2000", "AVIF"):
        try:
            cases.append(encoded(picture, kind))
        except (OSError, KeyError):  # PIL without that codec
            continue
    return [{"photo": data} for data in cases]


def _decode(folder: Path) -> None:
    from tljax.data.images import BadImage, decode
    from tljax.errors import UserError

    data = only(folder).read_bytes()
    for options in ({}, {"target": 8, "box": lambda h, w: (0, 0, h // 2 + 1, w // 2 + 1)}):
        try:
            found = decode(data, **options)
        except BadImage as error:  # its callers know the name of the file
            raise UserError(f"photo: {error}") from error
        assert found.dtype == np.uint8, found.dtype
        assert found.ndim == 3, found.shape
        assert found.shape[2] == 3, found.shape


def _image_ways(name: str) -> tuple[m.Mutation, ...]:
    return (*m.BYTES, m.near_ends, m.near_ends, m.png)


def _parquet() -> list[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = [encoded(photo((8 + i, 8)), "PNG") for i in range(6)]
    feature = {"names": ["ant", "bee"], "_type": "ClassLabel"}
    info = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
    images = [{"bytes": photo, "path": f"{i}.png"} for i, photo in enumerate(photos)]
    hub = pa.table({"image": images, "label": pa.array([0, 1] * 3, pa.int64())})
    plain = pa.table({"image": photos, "label": ["a", "b", "c"] * 2})

    def write(table, **options):
        return saved(lambda path: pq.write_table(table, path, **options))

    hub = hub.replace_schema_metadata({"huggingface": info})
    return [
        {"data.parquet": write(hub)},
        {"data.parquet": write(plain, compression="zstd", data_page_version="2.0")},
        {"data.parquet": write(plain, compression="none", use_dictionary=False, store_schema=False)},
    ]


def _table(folder: Path) -> None:
    from tljax import data

    found = data.load({"source": f"parquet:{only(folder)}", "on_bad": "skip"})
    for split in (found.train, found.val, found.test):
        for i in range(len(split)):
            split[i]


def _npm() -> list[Case]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in (("package/package.json", b"{}"), ("package/model/x.bin", bytes(600))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return [{"x.tgz": out.getvalue()}]


def _unpack(folder: Path) -> None:
    from tljax import npm
    from tljax.errors import UserError

    try:
        npm.unpack(folder / "x.tgz", folder / "whole")
    except (OSError, tarfile.TarError) as error:  # what its caller makes one line of
        raise UserError(f"npm: {' '.join(str(error).split())}") from error


TARGETS = {
    "images": Target(_images, _decode, _image_ways, bound=256 * MB, share=2, lies=lies.images),
    "parquet": Target(
        _parquet,
        _table,
        lambda name: (*m.BYTES, m.near_ends, m.near_ends),
        bound=128 * MB,
        share=0.5,
        lies=lies.parquet,
    ),
    "npm": Target(_npm, _unpack, lambda name: (m.gzipped(m.BYTES), *m.BYTES)),
}

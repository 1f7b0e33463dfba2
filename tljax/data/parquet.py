"""Parquet files with an image column and a label column, Hugging Face image data sets among them."""

import hashlib
import mmap
from pathlib import Path

import numpy as np

from tljax.data import parquet_pages
from tljax.data.table import Table, split_name
from tljax.errors import UserError, unknown
from tljax.files import check, locate, parsed
from tljax.stores import is_remote

# What the columns may unpack to: photographs are compressed already. And how many rows are unpacked at a time, of which
# a file may repeat one of its own length.
DENSEST, SMALL, ROWS = 100, 1 << 26, 256


class _Column:
    """Random access to a binary column; a row becomes `bytes` when it is asked for."""

    def __init__(self, column):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: int) -> bytes:
        return self._column[row].as_py() or b""


def read(fields, path: str) -> Table:
    """Reads a parquet file, or a directory of them in the Hugging Face layout (`train-*.parquet`, …).

    The image column holds encoded bytes or a struct {bytes, path}. Labels are strings or integers; the
    names of integer labels come from the schema's `huggingface` metadata where it has them. Splits come
    from the split column or, without one, from the file names; a lone file of another name is all training
    data. The encoded images stay in memory. Raises UserError.
    """
    import pyarrow as pa

    place = locate(path, "data", f"-e '.[{fields.extra}]'" if fields.extra else "")
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"no *.parquet files in {place}")
    if fields.sha256:
        check(fields.sha256, *files)
    image_column, label_column = fields.image_column or "image", fields.label_column or "label"
    wanted = [image_column, label_column, *filter(None, (fields.coarse_column, fields.split_column))]
    tables = []
    for file in files:
        try:
            tables.append(_unpacked(file, list(dict.fromkeys(wanted))))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            detail = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is no readable parquet file: {detail}") from error

    splits = [_splits(file, table, fields.split_column, len(files) == 1) for file, table in zip(files, tables)]
    columns, names = [], []
    for file, table in zip(files, tables):
        column, paths = _images(file, table.column(image_column))
        columns.extend(column.chunks)
        names.extend(p or f"{file.name}:row {row}" for row, p in enumerate(paths))
    images = _Column(pa.chunked_array(columns, type=columns[0].type))
    labels = _labels(label_column, [value for table in tables for value in table.column(label_column).to_pylist()])
    coarse = None
    if fields.coarse_column:
        coarse = [str(value) for table in tables for value in table.column(fields.coarse_column).to_pylist()]
    return Table(
        images=images,
        labels=labels,
        names=names,
        splits=np.concatenate(splits),
        keys=[hashlib.sha256(images[row]).hexdigest() for row in range(len(images))],
        coarse=coarse,
        class_names=_class_names(tables[0].schema, label_column, files[0]),
        origin=path if is_remote(path) else str(place),
    )


def _unpacked(file: Path, wanted: list[str]):
    """Some columns of a file; what its lengths claim is not believed. Raises UserError, and what Arrow raises."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    length = file.stat().st_size
    limits = {f"thrift_{what}_size_limit": max(length, 1) for what in ("string", "container")}
    with pq.ParquetFile(file, **limits) as opened:
        schema = opened.schema_arrow
        for name in wanted:
            if name not in schema.names:
                raise unknown(f"column of {file.name}:", name, schema.names)
        if not 0 <= opened.metadata.num_rows <= length:
            raise ValueError(f"claims {opened.metadata.num_rows:,} rows in {length:,} bytes")
        most, parts, taken = max(SMALL, DENSEST * length), [], 0
        if _largest(file, wanted) > most:
            raise ValueError(f"claims to unpack to more than {DENSEST} times its {length:,} bytes")
        for part in opened.iter_batches(ROWS, columns=wanted):
            parts.append(part)
            taken += part.nbytes
            if taken > most:  # by references to a value that the file has once
                raise ValueError(f"unpacks to more than {DENSEST} times its {length:,} bytes")
        fields = pa.schema([schema.field(name) for name in wanted], schema.metadata)
        table = pa.Table.from_batches([part.select(wanted) for part in parts], fields)
        table.validate(full=True)  # texts are UTF-8
        return table


def _largest(file: Path, wanted: list[str]) -> int:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return parquet_pages.largest(mapped, wanted)


def _splits(file: Path, table, column: str, alone: bool) -> np.ndarray:
    if column:
        values = table.column(column).to_pylist()
        found = {value: split_name(value) for value in set(values)}
        for value, split in found.items():
            if split is None:
                raise unknown(f"split in column {column!r} of {file.name}:", value, ("train", "val", "test"))
        return np.array([found[value] for value in values], dtype="U5")
    split = split_name(file.stem.split("-")[0])
    if split is None and not alone:
        raise UserError(f"{file.name}: the file's name says no split; expected train-*.parquet, test-*.parquet, …")
    return np.full(len(table), split or "train", dtype="U5")


def _images(file: Path, column) -> tuple:
    """The binary column, and the path of each photograph where the struct {bytes, path} has one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths = [None] * len(column)
    if pa.types.is_struct(column.type):
        inner = {field.name for field in column.type}
        if "bytes" not in inner:
            raise UserError(f"{file.name}: the image column's struct has {sorted(inner)}, expected bytes (and path)")
        if "path" in inner:
            paths = pc.struct_field(column, "path").to_pylist()
        column = pc.struct_field(column, "bytes")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        # One type for all files, whose offsets cannot overflow at 2 GiB.
        return column.cast(pa.large_binary()), paths
    raise UserError(f"{file.name}: the image column holds {column.type}, expected bytes or a struct of bytes and path")


def _labels(column: str, values: list) -> list:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {str}:
        return values
    if kinds <= {int, bool}:
        return [None if value is None else int(value) for value in values]
    raise UserError(
        f"labels in column {column!r} are {sorted(k.__name__ for k in kinds)}, expected strings or integers"
    )


def _class_names(schema, column: str, file: Path) -> tuple[str, ...] | None:
    """The ClassLabel names of the Hugging Face `datasets` metadata, None without them."""
    text = (schema.metadata or {}).get(b"huggingface")
    if not text:
        return None
    try:
        feature = parsed(text).get("info", {}).get("features", {}).get(column, {})
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, dict):  # how dataset cards store it: {"0": "cat", "1": "dog"}
            names = [names[key] for key in sorted(names, key=int)]
        if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
            raise ValueError(f"{str(names)[:40]!r} are no names of classes")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: the huggingface metadata of its schema cannot be read ({error})") from error
    return tuple(names) if names else None

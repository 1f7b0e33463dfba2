"""TFDS data sets that are already prepared, read as by `tfds.data_source`: no TensorFlow, no network."""

import os
from pathlib import Path

import numpy as np

from tljax.data.table import Table, split_name
from tljax.errors import UserError, listing, nearest, unknown
from tljax.stores import is_remote

LABELS_AT_ONCE = 4096  # reading in groups is ten times faster than one by one


class _Records:
    """The images of several splits, one after another."""

    def __init__(self, sources: list, key: str):
        self._sources, self._key = sources, key
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> bytes | np.ndarray:
        which = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return self._sources[which][row - start][self._key]


def read(fields, name: str) -> Table:
    """The splits train, validation and test of a prepared data set, named as in TFDS (`emnist/balanced`).

    Looks in data.data_dir (default: TFDS's own) and nowhere else; labels are read once, in order. Raises
    UserError.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("tensorflow_datasets is not installed: pip install -e '.[prepare]'") from None
    builder = tfds.builder_from_directory(_directory(name, fields.data_dir))
    if builder.info.file_format.value != "array_record":
        stored = builder.info.file_format.value
        raise UserError(
            f"{builder.data_path} is stored as {stored}, which only TensorFlow reads; "
            f"prepare it again elsewhere: {_how(name, 'DIR')}"
        )
    features = builder.info.features
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    image_key, label_key = fields.image_column or image_key, fields.label_column or label_key
    for key in (image_key, label_key):
        if key not in features:
            raise unknown(f"feature of {name}", key, features)
    # Encoded bytes go through the pipeline's own decoder, as from any other source.
    encoded = isinstance(features[image_key], tfds.features.Image)
    decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None
    used = {split: split_name(split) for split in builder.info.splits if split_name(split)}
    unused = sorted(set(builder.info.splits) - set(used))
    sources = {split: builder.as_data_source(split, decoders=decoders) for split in used}

    labels, names, splits = [], [], []
    for split, source in sources.items():
        for start in range(0, len(source), LABELS_AT_ONCE):
            rows = range(start, min(start + LABELS_AT_ONCE, len(source)))
            labels += [_label(example[label_key]) for example in source.__getitems__(list(rows))]
        names += [f"{name}:{split}[{row}]" for row in range(len(source))]
        splits += [used[split]] * len(source)
    return Table(
        images=_Records(list(sources.values()), image_key),
        labels=labels,
        names=names,
        splits=np.array(splits, dtype="U5"),
        class_names=tuple(getattr(features[label_key], "names", None) or ()) or None,
        licence=(builder.info.redistribution_info.license or "") if builder.info.redistribution_info else "",
        origin=f"TFDS {builder.info.full_name}, {builder.info.homepage}",
        notes=(f"splits not used: {listing(unused)}",) if unused else (),
    )


def _label(value) -> str | int:
    return value.decode() if isinstance(value, bytes) else int(value)


def data_root(data_dir: str) -> Path:
    """Where prepared data lie: `data_dir`, or TFDS's own default."""
    if is_remote(data_dir):
        raise UserError(f"config.data.data_dir = {data_dir!r}: prepared data are read from a local folder; copy them")
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _how(name: str, data_dir: str) -> str:
    return f"python -m tljax.data.prepare {name}" + (f" --data_dir={data_dir}" if data_dir else "")


def _directory(name: str, data_dir: str) -> Path:
    """The newest prepared version; TFDS is not asked, because it would answer by downloading."""
    root = data_root(data_dir)
    place, _, version = name.partition(":")
    inside = root / place
    found = [p.parent for p in inside.glob("**/dataset_info.json") if "incomplete" not in p.parent.name]
    if version:
        found = [p for p in found if p.name == version]
    if not found:
        there = sorted({p.relative_to(root).parts[0] for p in root.glob("*/**/dataset_info.json")})
        raise UserError(f"{name} is not prepared in {root}{nearest(name, there)}; prepare it: {_how(name, data_dir)}")
    configs = sorted({p.parent.relative_to(root).as_posix() for p in found})
    if len(configs) > 1:
        raise UserError(f"{name} is prepared in several configurations: {listing(configs)}; name one of them")
    return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")])

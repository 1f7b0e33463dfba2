"""From config fields to a `Dataset` with three splits: every photograph once, labels as class numbers."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tljax.data import splits as splitting
from tljax.data.catalogue import CATALOGUE
from tljax.data.table import SPLITS, Table
from tljax.errors import UserError, listing, unknown

KINDS = ("parquet", "folder", "filenames", "tfds")


@dataclass(frozen=True)
class Fields:
    """The fields of `config.data`, with their defaults. An empty string leaves the choice to the source.

    val: "split" (the given one; without one 10 % of train) | "fold:2/5" of train + val | "fraction:0.1" |
    "none" (train on train + val). test: "split" (the given one; without one 20 % of train) |
    "fraction:0.2". fold_seed seeds all these draws. limit: photographs a class in train, 0 for all.
    on_bad: "stop" | "skip" for what is no image, or has two labels.
    """

    source: str = "fruit"
    image_column: str = ""
    label_column: str = ""
    coarse_column: str = ""
    split_column: str = ""
    val: str = "split"
    test: str = "split"
    fold_seed: int = 0
    limit: int = 0
    on_bad: str = "stop"
    data_dir: str = ""
    sha256: str = ""
    num_classes: int = 0
    # Only a catalogue entry sets these.
    extra: str = ""
    licence: str = ""
    origin: str = ""


def defaults() -> dict:
    """The fields a config may set, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(Fields) if f.name not in ("extra", "licence", "origin")}


class Split:
    """The photographs of one split. `split[i]` → (encoded bytes or uint8 array, class number)."""

    def __init__(self, table: Table, rows: np.ndarray, labels: np.ndarray):
        self._images, self._names, self._rows = table.images, table.names, rows
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self._images[int(self._rows[index])], int(self.labels[index])

    def take(self, places: np.ndarray) -> "Split":
        """The photographs at some places, in their order."""
        part = copy.copy(self)
        part._rows, part.labels = self._rows[places], self.labels[places]
        return part

    @property
    def rows(self) -> np.ndarray:
        """Where each photograph stands in the data's table, whatever the split."""
        return self._rows

    def join(self, *others: "Split") -> "Split":
        """The photographs of several splits of one table, each once, in the table's order."""
        rows = np.concatenate([self._rows, *(split.rows for split in others)])
        labels = np.concatenate([self.labels, *(split.labels for split in others)])
        whole = copy.copy(self)
        whole._rows, first = np.unique(rows, return_index=True)
        whole.labels = labels[first]
        return whole

    def places(self, part: "Split") -> np.ndarray:
        """Where the photographs of a part of a joined split stand in it."""
        return np.searchsorted(self._rows, part.rows)

    @property
    def names(self) -> list[str]:
        """File name, or row, of each photograph."""
        return [self._names[row] for row in self._rows]

    def name(self, index: int) -> str:
        """File name, or row, of one photograph."""
        return self._names[self._rows[index]]


@dataclass(frozen=True)
class Dataset:
    """Three splits over the same classes.

    coarse: the coarse class of each class, or None. report: lines that loading has to say. digest: hex, of
    every photograph's split, class, name and, where the source knows it, content.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    coarse: tuple[str, ...] | None
    licence: str
    origin: str
    report: tuple[str, ...]
    digest: str


def load(config: Mapping) -> Dataset:
    """Reads the data set that `config.data` describes: its table, not yet its pixels. Raises UserError.

    Each photograph is used once; test is never split, tuned on or reshuffled.
    """
    fields = _resolve(config)
    _kind(fields)
    if fields.on_bad not in ("stop", "skip"):
        raise unknown("value of data.on_bad", fields.on_bad, ("stop", "skip"))
    # Spelling mistakes surface before anything is read.
    val = splitting.parse("val", fields.val, ("split", "none", "fold", "fraction"))
    test = splitting.parse("test", fields.test, ("split", "fraction"))
    table = _read(fields)
    report = list(table.notes)

    labels, classes = class_numbers(table)
    keep = labels >= 0
    if not keep.all():
        report.append(f"photographs without a label left out: {int((~keep).sum())}")
    if table.keys is not None:
        rows = np.flatnonzero(keep)
        keys, names = [table.keys[r] for r in rows], [table.names[r] for r in rows]
        once, lines = splitting.unique(keys, labels[rows], table.splits[rows], names, fields.on_bad == "skip")
        keep[rows[~once]] = False
        report += lines
    if fields.on_bad == "skip":
        # Now, and not while training: the order of the photographs must not depend on what fails to decode.
        bad = _undecodable(table, np.flatnonzero(keep))
        keep[bad] = False
        if bad:
            report.append(f"unreadable files skipped: {len(bad)} ({listing([table.names[r] for r in bad], 3)})")

    rows = _assign(table, labels, keep, val, test, fields, report)
    if fields.limit:
        train = rows["train"]
        rows["train"] = train[splitting.first_of_each(labels[train], fields.limit, fields.fold_seed)]
    _check(rows, labels, classes, fields)
    counts = ", ".join(f"{len(rows[split]):,} {split}" for split in SPLITS)
    report.insert(0, f"{counts} photographs of {len(classes)} classes")
    digest = hashlib.sha256(repr(classes).encode())
    for split in SPLITS:
        for row in rows[split]:
            key = table.keys[row] if table.keys else ""
            digest.update(f"{split}\t{labels[row]}\t{table.names[row]}\t{key}\n".encode())
    return Dataset(
        name=str(config.get("source", fields.source)),
        classes=classes,
        **{split: Split(table, rows[split], labels[rows[split]]) for split in SPLITS},
        coarse=_coarse(table, labels, classes, keep),
        licence=fields.licence or table.licence,
        origin=fields.origin or table.origin,
        report=tuple(report),
        digest=digest.hexdigest(),
    )


def read(config: Mapping) -> Table:
    """One row a photograph of the data that fields such as those of `config.data` describe, before all settling."""
    fields = _resolve(config)
    table = _read(fields)
    return dataclasses.replace(table, licence=fields.licence or table.licence, origin=fields.origin or table.origin)


def _resolve(config: Mapping) -> Fields:
    """Config fields over the catalogue's over the defaults; an empty field never hides the catalogue's."""
    names = {f.name for f in dataclasses.fields(Fields)}
    source = str(config.get("source", Fields.source))
    # The catalogue's number of classes is for those who have no data at hand; the data know better.
    entry = {name: value for name, value in CATALOGUE.get(source, {}).items() if name != "num_classes"}
    given = {name: config[name] for name in config if name in names and config[name] not in ("", None)}
    return Fields(**{**given, "source": source, **entry, **{k: v for k, v in given.items() if k != "source"}})


def _kind(fields: Fields) -> tuple[str, str]:
    """What kind of source it is, and where."""
    kind, _, where = fields.source.partition(":")
    if kind not in KINDS or not where:
        raise unknown("data source", fields.source, [*CATALOGUE, *(f"{kind}:…" for kind in KINDS)])
    return kind, where


def _read(fields: Fields) -> Table:
    kind, where = _kind(fields)
    if kind == "parquet":
        from tljax.data import parquet as module
    elif kind == "folder":
        from tljax.data import folder as module
    elif kind == "filenames":
        from tljax.data import filenames as module
    else:
        from tljax.data import tfds as module
    return module.read(fields, where)


def class_numbers(table: Table) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class number of each row (−1: unlabelled); the classes: declared ones in order, others sorted."""
    values = table.labels
    if table.class_names:
        numbers = np.array([-1 if v is None else int(v) for v in values], np.int32)
        if len(numbers) and numbers.max() >= len(table.class_names):
            raise UserError(f"label {numbers.max()} found, but there are names for {len(table.class_names)} classes")
        return numbers, table.class_names
    found = sorted({v for v in values if v is not None and v != -1})
    number = {value: i for i, value in enumerate(found)}
    return np.array([number.get(v, -1) for v in values], np.int32), tuple(str(v) for v in found)


def _undecodable(table: Table, rows: np.ndarray) -> list[int]:
    import os
    from concurrent.futures import ThreadPoolExecutor

    from tljax.data.images import BadImage, decode

    def bad(row: int) -> bool:
        try:
            decode(table.images[int(row)])
        except BadImage:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [int(row) for row, is_bad in zip(rows, pool.map(bad, rows)) if is_bad]


def _assign(table, labels, keep, val, test, fields, report) -> dict[str, np.ndarray]:
    """Row numbers of the three splits."""
    rows = {split: np.flatnonzero(keep & (table.splits == split)) for split in SPLITS}
    if test[0] == "split" and not len(rows["test"]):
        test = ("fraction", 0.2)
        report.append("no test split is given: 20 % of each class of train taken (data.test)")
    elif test[0] == "fraction" and len(rows["test"]):
        raise UserError(f"data.test={fields.test!r}, but the data have a test split of {len(rows['test'])} photographs")
    if test[0] == "fraction":
        # Another seed than val's: the two draws are independent.
        rows["train"], rows["test"] = _draw(rows["train"], labels, test[1], fields.fold_seed + 1)
    if val[0] == "split" and not len(rows["val"]):
        val = ("fraction", 0.1)
        report.append("no val split is given: 10 % of each class of train taken (data.val)")
    if val[0] == "fold":
        pool = np.sort(np.concatenate([rows["train"], rows["val"]]))
        fold = splitting.folds(labels[pool], val[2], fields.fold_seed)
        rows["train"], rows["val"] = pool[fold != val[1] - 1], pool[fold == val[1] - 1]
    elif val[0] == "fraction":
        if len(rows["val"]):
            report.append(f"the given val split of {len(rows['val'])} photographs is not used")
        rows["train"], rows["val"] = _draw(rows["train"], labels, val[1], fields.fold_seed)
    elif val[0] == "none":
        rows["train"], rows["val"] = np.sort(np.concatenate([rows["train"], rows["val"]])), rows["val"][:0]
    return rows


def _draw(rows: np.ndarray, labels: np.ndarray, part: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    taken = splitting.fraction(labels[rows], part, seed)
    return rows[~taken], rows[taken]


def _check(rows: dict, labels: np.ndarray, classes: tuple[str, ...], fields: Fields) -> None:
    trained = set(labels[rows["train"]].tolist())
    if not trained:
        raise UserError(f"{fields.source}: no photographs to train on")
    if len(trained) == 1:
        raise UserError(f"{fields.source}: one class only ({classes[trained.pop()]}); expected two or more")
    for split in ("val", "test"):
        absent = sorted(set(labels[rows[split]].tolist()) - trained)
        if absent:
            names = listing(classes[i] for i in absent)
            raise UserError(f"{fields.source}: {split} has classes that train lacks: {names}")
    if fields.num_classes and fields.num_classes != len(classes):
        raise UserError(f"data.num_classes is {fields.num_classes}, but {fields.source} has {len(classes)} classes")


def _coarse(table: Table, labels: np.ndarray, classes: tuple[str, ...], keep: np.ndarray) -> tuple[str, ...] | None:
    if table.coarse is None:
        return None
    found: dict[int, str] = {}
    for row in np.flatnonzero(keep):
        coarse = found.setdefault(int(labels[row]), table.coarse[row])
        if coarse != table.coarse[row]:
            name = classes[labels[row]]
            raise UserError(f"class {name!r} lies in two coarse classes: {coarse!r} and {table.coarse[row]!r}")
    return tuple(found.get(i, "") for i in range(len(classes)))

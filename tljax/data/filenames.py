"""Photographs whose label stands in the file's name, behind the last underscore: `imagenet_00_243.jpg`."""

from fnmatch import fnmatchcase

import numpy as np

from tljax.data.folder import SUFFIXES, Files, content_keys
from tljax.data.table import Table
from tljax.errors import UserError, listing
from tljax.files import check, locate
from tljax.stores import is_remote


def read(fields, where: str) -> Table:
    """Lists the images in a folder, those that match where its last part is a pattern (`DIR/imagenet_*.jpg`).

    Labels that are whole numbers become numbers. All is training data. Raises UserError for a folder without such
    images, for names without a label and for contents of another SHA-256 than `fields.sha256`.
    """
    folder, slash, last = where.rpartition("/")
    pattern = last if "*" in last else "*"
    install = f"-e '.[{fields.extra}]'" if fields.extra else ""
    root = locate(where if pattern == "*" and last != "*" else folder + slash or ".", "data", install)
    if not root.is_dir():
        raise UserError(f"{root} is a file; expected a directory of images")
    files = [f for f in sorted(root.iterdir()) if fnmatchcase(f.name, pattern) and f.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{root} holds no images {pattern}")
    if fields.sha256:
        check(fields.sha256, *files)
    labels = [f.stem.rpartition("_")[2] if "_" in f.stem else "" for f in files]
    bad = [f.name for f, label in zip(files, labels) if not label]
    if bad:
        raise UserError(f"{root}: no label behind an underscore in {listing(bad, 3)}; expected names as cat1_cat.jpg")
    if all(label.isdecimal() for label in labels):
        labels = [int(label) for label in labels]
    return Table(
        images=Files(files),
        labels=labels,
        names=[f.name for f in files],
        splits=np.full(len(files), "train", dtype="U5"),
        keys=content_keys(files),
        origin=where if is_remote(where) else str(root),
    )

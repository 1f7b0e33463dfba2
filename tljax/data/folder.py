"""Photographs in folders: `root/<class>/*.jpg`, or `root/train/<class>/*.jpg` beside `val` and `test`."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from tljax.data.table import Table, split_name
from tljax.errors import UserError, listing
from tljax.files import locate
from tljax.stores import is_remote

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
}


class Files:
    """Random access to files; a row becomes `bytes` when it is asked for."""

    def __init__(self, files: list[Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> bytes:
        try:
            return self._files[row].read_bytes()
        except OSError as error:
            raise UserError(f"{self._files[row]} cannot be read: {error.strerror}") from None


def read(fields, path: str) -> Table:
    """Lists the images below `path`; a photograph's class is its folder's name, folders inside belong to it.

    Hidden files are ignored, files of other endings are counted and reported. Raises UserError for a folder
    without classes and for a class without images.
    """
    root = locate(path, "data")
    if not root.is_dir():
        raise UserError(f"{root} is a file; expected a directory with one folder a class")
    tops = _folders(root)
    by_split = {folder: split_name(folder.name) for folder in tops}
    if "train" not in by_split.values():
        # root/<class>: one pool, from which val and test are drawn.
        by_split = {root: "train"}
    elif None in by_split.values():
        odd = [folder.name for folder, split in by_split.items() if split is None]
        raise UserError(f"{root} has train and also {listing(odd)}: expected train, val and test only")

    files, labels, splits, others = [], [], [], Counter()
    for top, split in by_split.items():
        classes = _folders(top)
        if not classes:
            raise UserError(f"{top} holds no class folders; expected {top.name}/<class>/*.jpg")
        for folder in classes:
            inside = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.name.startswith(".")]
            images = [f for f in inside if f.suffix.lower() in SUFFIXES]
            if not images:
                raise UserError(f"class folder {folder} holds no images ({len(inside)} other files)")
            others.update(f.suffix.lower() or "no ending" for f in inside if f.suffix.lower() not in SUFFIXES)
            files += images
            labels += [folder.name] * len(images)
            splits += [split] * len(images)
    notes = [f"files of other endings ignored: {sum(others.values())} ({listing(sorted(others))})"] if others else []
    return Table(
        images=Files(files),
        labels=labels,
        names=[f.relative_to(root).as_posix() for f in files],
        splits=np.array(splits, dtype="U5"),
        keys=content_keys(files),
        origin=path if is_remote(path) else str(root),
        notes=tuple(notes),
    )


def _folders(root: Path) -> list[Path]:
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def content_keys(files: list[Path]) -> list[str]:
    """Equal for equal contents. Only files of equal size are read: of 500 photographs hardly any."""
    sizes = [f.stat().st_size for f in files]
    shared = {size for size, count in Counter(sizes).items() if count > 1}
    return [
        f"{size}:{hashlib.sha256(f.read_bytes()).hexdigest() if size in shared else ''}"
        for f, size in zip(files, sizes)
    ]
